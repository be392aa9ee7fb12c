"""A small Hugging Face Hub on this machine: the HTTP endpoints that huggingface_hub asks, with repositories in memory.

It checks what the Hub checks: tokens, names, the YAML of a README.md. Every request is kept.
"""

import base64
import contextlib
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_of_the_owner"


class Refused(Exception):
    def __init__(self, status, code="", message="", **more):
        self.status, self.code, self.message, self.more = status, code, message, more


class Repository:
    def __init__(self, private):
        self.private = private
        self.commits = {}  # sha -> files
        self.branches = {}
        self.messages = []
        self.commit("main", {}, "initial commit")

    def commit(self, branch, files, message):
        text = json.dumps([message, len(self.commits), {name: held.hex() for name, held in files.items()}])
        sha = hashlib.sha1(text.encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        self.messages.append(message)
        return sha

    def sha(self, revision):
        sha = self.branches.get(revision, revision)
        if sha not in self.commits:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha


class Hub:
    """The repositories by id, and the requests, as `(method, path)`."""

    def __init__(self):
        self.repositories = {}
        self.requests = []
        self.down = False
        self.url = ""

    def files(self, repo_id, revision="main"):
        one = self.repositories[repo_id]
        return one.commits[one.sha(revision)]

    def holds(self, repo_id, folder, private=False, into="", branch="main"):
        """Commit the files of a folder, as a user of git does."""
        one = self.repositories.setdefault(repo_id, Repository(private))
        held = one.commits[one.branches["main"]] if one.branches else {}
        new = {into + path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*.*")}
        return one.commit(branch, held | new, "by hand")

    def answer(self, method, path, body, token):
        self.requests.append((method, path))
        if self.down:
            raise Refused(503, "", "the Hub is down")
        if path == "/api/validate-yaml":
            return validate(json.loads(body)["content"])
        if path == "/api/repos/create":
            return self.create(json.loads(body), token)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w+)/([^/]+))?", path):
            name, action, revision = found.groups()
            return self.asked(self.open(name, token), name, action, revision or "main", body, token)
        found = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if found is None:
            raise Refused(404, "", f"no such endpoint: {path}")
        name, revision, file = found.groups()
        one = self.open(name, token)
        sha = one.sha(revision)
        if file not in one.commits[sha]:
            raise Refused(404, "EntryNotFound", f"{file} is not there")
        held = one.commits[sha][file]
        return held, {"ETag": f'"{hashlib.sha1(held).hexdigest()}"', "X-Repo-Commit": sha}

    def open(self, name, token):
        one = self.repositories.get(name)
        if one is None or (one.private and token != TOKEN):
            raise Refused(401 if token is None else 404, "RepoNotFound", "Repository not found")
        return one

    def create(self, asked, token):
        if token != TOKEN:
            raise Refused(401, "", "Invalid username or password.")
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] != "owner":
            raise Refused(403, "", f"You don't have the rights to create a model under {asked['organization']}")
        if name in self.repositories:
            raise Refused(409, "", "You already created this model repo", url=f"{self.url}/{name}")
        self.repositories[name] = Repository(asked.get("visibility") == "private" or bool(asked.get("private")))
        return {"url": f"{self.url}/{name}", "id": name}

    def asked(self, one, name, action, revision, body, token):
        if action in (None, "revision"):
            sha = one.sha(revision)
            files = [{"rfilename": path} for path in one.commits[sha]]
            return {"id": name, "sha": sha, "private": one.private, "siblings": files}
        if action == "tree":
            files = one.commits[one.sha(revision)]
            return [{"type": "file", "path": path, "size": len(held), "oid": git(held)} for path, held in files.items()]
        if token != TOKEN:
            raise Refused(403, "", "the token may not write here")
        if action == "branch":
            if revision in one.branches:
                raise Refused(409, "", "Reference already exists")
            one.branches[revision] = one.sha("main")
            return {}
        if action == "preupload":
            names = [file["path"] for file in json.loads(body)["files"]]
            return {"files": [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in names]}
        assert action == "commit"
        return self.committed(one, name, revision, [json.loads(line) for line in body.splitlines() if line])

    def committed(self, one, name, revision, lines):
        files, message = dict(one.commits[one.sha(revision)]), ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            else:
                assert line["key"] == "deletedFile"
                del files[value["path"]]
        sha = one.commit(revision, files, message)
        return {"commitUrl": f"{self.url}/{name}/commit/{sha}", "commitOid": sha, "success": True}


def git(held):
    return hashlib.sha1(b"blob %d\0" % len(held) + held).hexdigest()


def validate(content):
    """The Hub's rule that bites adapters: a base is an id, no path."""
    fields = yaml.safe_load(content.split("---")[1])
    base = fields.get("base_model")
    if base and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base):
        raise Refused(400, errors=[{"message": f'"base_model" is not a valid model id: {base}'}], warnings=[])
    return {"errors": [], "warnings": []}


class Server(ThreadingHTTPServer):
    hub: Hub


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        assert isinstance(self.server, Server)
        hub = self.server.hub
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        authorization = self.headers.get("Authorization")
        token = authorization.removeprefix("Bearer ") if authorization else None
        try:
            found = hub.answer(self.command, unquote(urlsplit(self.path).path), body, token)
            held, headers = found if isinstance(found, tuple) else (json.dumps(found).encode(), {})
            self.send_response(200)
        except Refused as refused:
            held = json.dumps({"error": refused.message, **refused.more}).encode()
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message}
            self.send_response(refused.status)
        for name, value in {"Content-Length": str(len(held)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(held)

    do_HEAD = do_POST = do_GET


@contextlib.contextmanager
def running():
    """A `Hub` that listens on a free port."""
    hub = Hub()
    server = Server(("127.0.0.1", 0), Handler)
    server.hub = hub
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
