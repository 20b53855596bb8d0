"""README.md and docs/: their code runs, their links lead somewhere, and they build without a warning.

Python fences run on four ranks, page by page, each with the names that a reader has when reading it (``names``). A diff
runs as what it leaves behind. Fences with ``hvd`` run under Horovod, those of hogwild in this process.
"""
import functools
import importlib.util
import itertools
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import thinwire
import torch
from sybil import Sybil
from sybil.parsers.markdown import CodeBlockParser
from torch import nn
from torch.nn.parallel import DistributedDataParallel

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(page for page in DOCS.rglob("*.md") if page.parent.name != "tables")]
RUN = ("python", "diff")
NOT_RUN = {"sh", "text", "{eval-rst}", "{include}", "{toctree}"}
WIDTH = 32


# ---- what a page has to run ----


def evaluate_nowhere(example):
    raise NotImplementedError("fences are run by run_fences")


@functools.cache
def fences(page):
    """(line, language, source) of each fence to run, in order."""
    sybil = Sybil([CodeBlockParser(language, evaluate_nowhere) for language in RUN], path=ROOT, pattern="*.md")
    found = []
    for example in sybil.parse(page).examples():
        source = str(example.parsed)
        line = example.line + example.parsed.line_offset + 1
        language = page.read_text().splitlines()[example.line - 1].strip(" `")
        if language == "diff":
            after = [text[1:] for text in source.splitlines() if not text.startswith("-")]
            source = "\n".join(after)
        found.append((line, language, textwrap.dedent(source)))
    return found


def needs_horovod(source):
    return "hvd." in source or "thinwire.horovod" in source


def runnable(page, with_horovod):
    return [(f"{page.relative_to(ROOT)}", line, source) for line, _, source in fences(page)
            if needs_horovod(source) == with_horovod and "hogwild" not in source]  # fmt: skip


PAGES_FOR_RANKS = [page for page in PAGES if runnable(page, with_horovod=False)]


# ---- what a reader has when reading it ----


def make_batches(worker, workers):
    generator = torch.Generator().manual_seed(worker)
    while True:
        yield torch.randn(8, WIDTH, generator=generator)


def loss_fn(model, batch):
    return (model(batch) - batch).square().mean()


def new_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 64), nn.Tanh(), nn.Linear(64, WIDTH))


def names(rank, world_size):
    """What the pages take for granted: a model, an optimizer, batches, a loss, and the modules they are made of."""
    model = new_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    stream = make_batches(rank, world_size)
    return {
        "torch": torch, "thinwire": thinwire, "functools": functools, "itertools": itertools,
        "DistributedDataParallel": DistributedDataParallel, "rank": rank, "world_size": world_size,
        "old_world_size": world_size, "model": model, "optimizer": optimizer,
        "batches": [(batch, batch) for batch in itertools.islice(stream, 8)],
        "loss": nn.functional.mse_loss, "evaluate": lambda network: network(torch.ones(1, WIDTH)),
        "make_batches": make_batches, "loss_fn": loss_fn, "pl": SimpleNamespace(Callback=object),
    }  # fmt: skip


def with_ddp(found, source):
    """The names with DDP, and with a handle that is at work where the source uses one that it does not make."""
    ddp = found["ddp"] = DistributedDataParallel(found["model"])
    found["accelerator"] = SimpleNamespace(prepare=lambda model, optimizer: (ddp, optimizer))
    if "handle" in source and "handle = " not in source:
        method = thinwire.BlockSparse("nominated", density=0.04)
        found["handle"] = thinwire.attach(ddp, method, optimizer=found["optimizer"])
        for x, y in found["batches"][:2]:
            found["loss"](ddp(x), y).backward()
    return found


def execute(where, line, source, found):
    code = compile("\n" * (line - 1) + source, where, "exec")
    exec(code, found)
    if isinstance(handle := found.get("handle"), thinwire.Handle):
        handle.close()


def run_fences(rank, n, todo, folder):
    here = os.getcwd()
    os.chdir(folder)
    try:
        for where, line, source in todo:
            execute(where, line, source, with_ddp(names(rank, n), source))
    finally:
        os.chdir(here)


# ---- tests ----


@pytest.mark.parametrize("page", PAGES_FOR_RANKS, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_code_of_a_page_runs(ranks, page, tmp_path):
    ranks(4).run(run_fences, runnable(page, with_horovod=False), str(tmp_path), seconds=120.0)


def test_the_code_of_hogwild_runs():
    page = DOCS / "hogwild.md"
    ((line, _, source),) = fences(page)
    found = names(0, 1)
    execute(str(page), line, source, found)
    assert found["report"].updates == 1000


@pytest.mark.skipif(importlib.util.find_spec("horovod") is None, reason="Horovod is not installed: make horovod")
def test_the_code_for_horovod_runs():
    package = str(Path(thinwire.__file__).parent.parent)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": package, "GLOO_SOCKET_IFNAME": "lo"}
    horovodrun = Path(sys.executable).with_name("horovodrun")
    ended = subprocess.run([horovodrun, "-np", "2", "--gloo", sys.executable, __file__], env=env, timeout=300,
                           capture_output=True, text=True)  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr
    todo = sum(len(runnable(page, with_horovod=True)) for page in PAGES)
    assert ended.stdout.count(f"{todo} fences ran") == 2 and todo >= 5


def test_every_fence_is_of_a_language_that_is_run_or_known():
    for page in PAGES:
        opened = re.findall(r"^```(\S+)", page.read_text(), re.MULTILINE)
        assert set(opened) <= NOT_RUN | set(RUN), page
        assert len(fences(page)) == sum(language in RUN for language in opened), page


def test_every_link_of_the_readme_leads_somewhere():
    text = (ROOT / "README.md").read_text()
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", text) if not target.startswith("http")]
    assert len(targets) > 20
    for target in targets:
        path, _, anchor = target.partition("#")
        page = ROOT / path if path else ROOT / "README.md"
        assert page.exists(), target
        if anchor:
            assert anchor in anchors(page), target


def anchors(page):
    """The anchors that a page's titles are given."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160


def test_the_reference_has_every_public_name():
    text = (DOCS / "api.md").read_text()
    missing = [name for name in thinwire.__all__ if name != "schedules" and f":: thinwire.{name}\n" not in text]
    assert not missing


def test_every_table_is_shown_on_a_page():
    shown = {name for page in PAGES for name in re.findall(r"\{include\} .*tables/(\w+)\.md", page.read_text())}
    assert shown == {table.stem for table in (DOCS / "tables").glob("*.md")}


def test_they_build_without_a_warning(tmp_path):
    package = str(Path(thinwire.__file__).parent.parent)
    ended = subprocess.run([sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", DOCS, tmp_path],
                           env=os.environ | {"PYTHONPATH": package}, capture_output=True, text=True)  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    pictures = {picture.name for page in tmp_path.rglob("*.html") for picture in _pictures(page)}
    assert "demo.png" in pictures and len(pictures) >= 10


def _pictures(page):
    """The picture files of a built page, which must all be there."""
    for source in re.findall(r'<img [^>]*src="([^"]+)"', page.read_text()):
        picture = (page.parent / source).resolve()
        assert picture.exists(), (page, source)
        yield picture


if __name__ == "__main__":  # one rank of horovodrun
    import horovod.torch as hvd

    hvd.init()
    done = 0
    for page in PAGES:
        for where, line, source in runnable(page, with_horovod=True):
            execute(where, line, source, names(hvd.rank(), hvd.size()) | {"hvd": hvd})
            done += 1
    print(f"{done} fences ran", flush=True)
    hvd.shutdown()
