"""
PG-19 (Rae et al., arXiv 1911.05507): 28,602 + 50 + 100 books published before 1919, 11 GB, the long-context benchmark.

    python data/pg19/prepare.py                     downloads it into data/pg19/, then tokenizes it
    python data/pg19/prepare.py --source ~/pg19     tokenizes a copy that is already here

Both ways the layout is the benchmark's own: {train,validation,test}/<id>.txt and metadata.csv (id, title, year, url).
The result is <out>/{train,validation,test}.<tokenizer>.tokens, 22 GB with the byte tokenizer and 6 GB with gpt2.
Interrupt it at any time: books that are whole (size and md5 as the bucket lists them) are not fetched again.
"""

import base64
import hashlib
import http.client
import json
import os
import random
import re
import shutil
import ssl
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

if not __package__:  # run as a script: Python put this folder on its path, the packages are in the repository's root
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import tyro
from tqdm import tqdm

from data.prepare import SPLITS, book_order, one_line_errors, prepare_folder

BUCKET = "deepmind-gutenberg"
CONNECTIONS = 16
BLOCK = 1 << 18  # bytes per read
# worth another try: no connection, a dropped, stalled or short one, an answer that is not the listing
TRANSIENT = (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError, ssl.SSLError,
             json.JSONDecodeError)
TRANSIENT_STATUS = (408, 429, 500, 502, 503, 504)


@dataclass
class Options:
    """Prepare PG-19: download it, or read a local copy, and tokenize it."""
    source: Path | None = None
    """folder that already holds {train,validation,test}/<id>.txt; without it the books are downloaded into --out"""
    out: Path = Path(__file__).resolve().parent
    """folder for the token files, and for the books that are downloaded"""
    tokenizer: str = "byte"
    """byte, gpt2 or the path of a tokenizer.json"""
    workers: int = field(default_factory=lambda: os.cpu_count() or 1)
    """processes that tokenize"""
    splits: tuple[Literal["train", "validation", "test"], ...] = SPLITS
    """which splits"""
    limit: int | None = None
    """only the first books of each split, by id"""
    base_url: str = "https://storage.googleapis.com"
    """the server that holds the bucket"""
    timeout: float = 30.0
    """seconds without a byte after which a connection counts as lost"""
    tries: int = 7
    """how often each book is tried; the pause between two tries starts at --backoff seconds and doubles"""
    backoff: float = 1.0
    """seconds before the second try, shortened by up to half at random so that connections do not return all at once"""


class Item(NamedTuple):
    """An object of the bucket, as listed."""
    name: str  # "train/123.txt"
    size: int  # bytes
    md5: str | None  # hex; None where the server keeps none


class Downloader:
    """Fetches parts of the bucket into options.out: 16 files at a time, each appearing whole or not at all."""

    def __init__(self, options: Options):
        if options.tries < 1 or (options.limit is not None and options.limit < 1):
            raise ValueError(f"--tries is {options.tries} and --limit {options.limit}, both must be 1 or more")
        self.options, self.base_url = options, options.base_url.rstrip("/")
        self.stop = threading.Event()

    def list_bucket(self, prefix: str) -> list[Item]:
        """All objects whose names begin with prefix, over as many pages as the server makes of them."""
        query = {"prefix": prefix, "fields": "items(name,size,md5Hash),nextPageToken", "maxResults": "1000"}
        url, items = f"{self.base_url}/storage/v1/b/{BUCKET}/o", []
        while True:
            page = self._retry(f"{url}?{urllib.parse.urlencode(query)}", lambda answer: json.loads(answer.read()))
            for item in page.get("items", []):
                md5 = base64.b64decode(item["md5Hash"]).hex() if "md5Hash" in item else None
                items.append(Item(item["name"], int(item["size"]), md5))
            if "nextPageToken" not in page:
                return items
            query["pageToken"] = page["nextPageToken"]

    def download(self) -> None:
        """metadata.csv and the books of the splits. ValueError: none there, disk too small, a file keeps failing."""
        out, wanted = self.options.out, self.list_bucket("metadata.csv")
        for split in self.options.splits:
            books = [i for i in self.list_bucket(f"{split}/") if re.fullmatch(rf"{split}/[\w-]+\.txt", i.name)]
            if not books:
                raise ValueError(f"{self.base_url}: bucket {BUCKET} lists no {split}/<id>.txt; check --base-url")
            wanted += sorted(books, key=lambda item: book_order(Path(item.name)))[:self.options.limit]
        out.mkdir(parents=True, exist_ok=True)
        need = sum(i.size for i in wanted if not (out / i.name).is_file())
        free = shutil.disk_usage(out).free
        if need > free:
            raise ValueError(f"{out}: {need:,} bytes to download, {free:,} free on this disk; choose another by --out")
        total = sum(i.size for i in wanted)
        with ThreadPoolExecutor(CONNECTIONS) as pool, \
                tqdm(total=total, desc="download", unit="B", unit_scale=True, disable=None) as bar:
            try:
                for done in as_completed([pool.submit(self._fetch, item) for item in wanted]):
                    bar.update(done.result())
            except BaseException:
                self.stop.set()
                pool.shutdown(cancel_futures=True)
                raise

    def _fetch(self, item: Item) -> int:
        path = self.options.out / item.name
        if not _is_whole(path, item):
            path.parent.mkdir(parents=True, exist_ok=True)
            url = f"{self.base_url}/{BUCKET}/{urllib.parse.quote(item.name)}"
            self._retry(url, lambda answer: self._save(answer, path, item))
        return item.size

    def _save(self, answer: http.client.HTTPResponse, path: Path, item: Item) -> None:
        tmp = path.with_name(f".{path.name}.tmp")  # the same at each try, so that a killed run's is used up by the next
        try:
            with open(tmp, "wb") as file:
                while (block := answer.read(BLOCK)) and not self.stop.is_set():
                    file.write(block)
            if self.stop.is_set():
                return
            if not _is_whole(tmp, item):
                raise ConnectionError(f"{tmp.stat().st_size} bytes came, {item.size} with md5 {item.md5} are listed")
            os.replace(tmp, path)
        finally:
            tmp.unlink(missing_ok=True)

    def _retry(self, url: str, use: Callable[[http.client.HTTPResponse], object]):
        """use(the answer to url), again with exponential back-off and jitter while the failure may pass."""
        for attempt in range(self.options.tries):
            if attempt:
                self.stop.wait(self.options.backoff * 2 ** (attempt - 1) * random.uniform(0.5, 1.0))
            if self.stop.is_set():
                return None
            try:
                with urllib.request.urlopen(url, timeout=self.options.timeout) as answer:
                    return use(answer)
            except TRANSIENT as error:
                reason = error
                if isinstance(error, urllib.error.HTTPError) and error.code not in TRANSIENT_STATUS:
                    raise ValueError(f"{url}: {error}; check --base-url") from None
        raise ValueError(f"{url}: {self.options.tries} tries failed, the last with: {reason}; run the same command to "
                         f"go on later, or give a local copy with --source")


def _is_whole(path: Path, item: Item) -> bool:
    if not path.is_file() or path.stat().st_size != item.size:
        return False
    md5 = hashlib.md5(usedforsecurity=False)
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            md5.update(block)
    return item.md5 in (None, md5.hexdigest())


def main() -> None:
    options = tyro.cli(Options)
    with one_line_errors():
        if options.source is None:
            Downloader(options).download()
        paths = prepare_folder(options.source or options.out, options.out, options.tokenizer, options.splits,
                               options.workers, options.limit)
        for path in paths.values():
            print(path)


if __name__ == "__main__":
    main()
