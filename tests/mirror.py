"""A local server of the files of a data set, which may answer badly."""

import contextlib
import dataclasses
import hashlib
import http.server
import threading

from flax_cifar.data.sources import catalog


def change_file(monkeypatch, name, number, **changes):
  """Changes attributes of a file in the catalog's entry `name`."""
  source = catalog.CATALOG[name]
  files = list(source.files)
  files[number] = dataclasses.replace(files[number], **changes)
  monkeypatch.setitem(catalog.CATALOG, name, dataclasses.replace(source, files=tuple(files)))


def remove_all(monkeypatch):
  """Leaves no mirror to any data set."""
  monkeypatch.delenv("FLAX_CIFAR_MIRROR", raising=False)
  for name, source in catalog.CATALOG.items():
    for number in range(len(source.files)):
      change_file(monkeypatch, name, number, urls=())


def expect(monkeypatch, name, number, blob):
  """Lets the file in the catalog's entry `name` be `blob`."""
  algorithm = catalog.CATALOG[name].files[number].algorithm
  checksum = hashlib.new(algorithm, blob).hexdigest()
  change_file(monkeypatch, name, number, size=len(blob), checksum=checksum)


@contextlib.contextmanager
def serve(blobs):
  """Serves `blobs[NAME]` at /KIND/NAME, or `blobs[""]` at /KIND; KIND selects the behavior.

  `server.seen` lists the requests: path and range of bytes.
  """

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      byte_range = self.headers.get("Range")
      self.server.seen.append((self.path, byte_range))
      kind, _, name = self.path.strip("/").partition("/")
      blob = blobs[name]
      body, status = (b"x" * len(blob) if kind == "wrong" else blob), 200
      if kind == "missing":
        return self.send_error(404)
      if byte_range and kind != "stubborn":
        body, status = body[int(byte_range.removeprefix("bytes=").rstrip("-")) :], 206
      self.send_response(status)
      if kind != "page":
        self.send_header("Content-Length", "all" if kind == "vague" else str(len(body)))
      self.end_headers()
      sent = {"breaks": body[: len(body) // 2], "page": b"<html>log in</html>"}.get(kind, body)
      return self.wfile.write(sent)

    def log_message(self, *args):
      pass

  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
    httpd.seen = []
    threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
    yield httpd
    httpd.shutdown()


def use(monkeypatch, server, name, *kinds):
  """Makes the kinds of `server` the mirrors of the data set `name`."""
  files = catalog.CATALOG[name].files
  for number, file in enumerate(files):
    path = f"/{file.name}" if len(files) > 1 else ""
    urls = tuple(f"http://127.0.0.1:{server.server_port}/{kind}{path}" for kind in kinds)
    change_file(monkeypatch, name, number, urls=urls)
