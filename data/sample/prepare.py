"""
Tokenizes the books beside this file, so that training and sampling work without a download:

    python data/sample/prepare.py [--tokenizer gpt2]      ->  data/sample/{train,validation,test}.<tokenizer>.tokens
"""

import sys
from dataclasses import dataclass
from pathlib import Path

if not __package__:  # run as a script: Python put this folder on its path, the packages are in the repository's root
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import tyro

from data.prepare import one_line_errors, prepare_folder

FOLDER = Path(__file__).resolve().parent


@dataclass
class Options:
    """Tokenize the sample books."""
    tokenizer: str = "byte"
    """byte, gpt2 or the path of a tokenizer.json"""
    out: Path = FOLDER
    """folder for the token files"""


def main() -> None:
    options = tyro.cli(Options)
    with one_line_errors():
        for path in prepare_folder(FOLDER, options.out, options.tokenizer).values():
            print(path)


if __name__ == "__main__":
    main()
