"""Corpus and batches: the split by file, the order, and what is refused."""

import math

import pytest
import torch

from deltafuse.train.data import (
    Batches,
    load_corpus,
    unigram_entropy,
    validation_batches,
    validation_names,
)
from deltafuse.train.errors import UserError


@pytest.fixture
def folder(tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02}.txt").write_text(f"file {i}: " + chr(97 + i % 26) * 50)
    return tmp_path


def test_files_are_split_whole(folder):
    corpus = load_corpus([folder], context=16)
    assert (corpus.train_files, corpus.validation_files) == (38, 2)
    parts = [bytes(part.tolist()) for part in (corpus.train, corpus.validation)]
    for path in folder.iterdir():
        assert [path.read_bytes() in part for part in parts].count(True) == 1


def test_a_new_file_moves_few_others():
    names = [f"{i}.py" for i in range(200)]
    before, after = validation_names(names), validation_names([*names, "new.py"])
    assert len(before) == 10
    assert len(before ^ after) <= 2


def test_hash_of_the_corpus_follows_its_content_alone(folder):
    before = load_corpus([folder], 16).sha256
    assert load_corpus([folder], 16).sha256 == before
    (folder / "05.txt").write_text("changed " * 9)
    assert load_corpus([folder], 16).sha256 != before


def test_single_file_is_split_at_its_end(tmp_path):
    path = tmp_path / "one.txt"
    path.write_bytes(bytes(range(1, 101)) * 10)
    corpus = load_corpus([path], context=32)
    assert (corpus.train.numel(), corpus.validation.numel()) == (901, 100)


def test_hidden_and_cache_folders_are_left_out(folder):
    (folder / "__pycache__").mkdir()
    (folder / "__pycache__" / "x.pyc").write_bytes(b"\0\1")
    (folder / ".git").mkdir()
    (folder / ".git" / "index").write_bytes(b"\0\1")
    assert load_corpus([folder], 16).train_files == 38


def test_default_is_the_standard_library():
    corpus = load_corpus(None, context=256)
    assert corpus.train.numel() > 3_000_000
    assert corpus.validation.numel() > 100_000
    assert 2.8 < corpus.unigram_nats < 3.6


@pytest.mark.parametrize(
    "content, message",
    [
        (b"abc\0def" * 20, "binary file"),
        (b"caf\xe9 " * 20, "not UTF-8 text: .*at byte 3"),
        (b"", "empty corpus"),
        (b"short", "corpus shorter than one context"),
    ],
)
def test_unusable_files_are_named(tmp_path, content, message):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load_corpus([path], context=64)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_missing_path_and_empty_folder(tmp_path):
    with pytest.raises(UserError, match="no such file or folder: .*nowhere"):
        load_corpus([tmp_path / "nowhere"], 16)
    with pytest.raises(UserError, match="empty corpus"):
        load_corpus([tmp_path], 16)


def test_unigram_entropy_of_known_histograms():
    uniform = torch.arange(256, dtype=torch.uint8).repeat(100)
    assert math.isclose(unigram_entropy(uniform, uniform), math.log(256), rel_tol=1e-9)
    biased = torch.tensor([1] * 3000 + [2] * 1000, dtype=torch.uint8)
    expected = -(0.75 * math.log(3001 / 4256) + 0.25 * math.log(1001 / 4256))
    assert math.isclose(unigram_entropy(biased, biased), expected, rel_tol=1e-9)


def test_an_epoch_visits_each_window_once():
    text = torch.arange(1000) % 251
    batches = Batches(text, context=10, batch=7, seed=0)
    count = len(batches.starts)
    seen = []
    while len(seen) < count:
        seen += batches.next()[:, 0].tolist()
    assert batches.epoch == 1 or batches.cursor == count
    batch = batches.next()
    assert batch.shape == (7, 11) and batch.dtype == torch.int64


def test_targets_are_the_inputs_one_further():
    batch = Batches(torch.arange(200), context=16, batch=3, seed=5).next()
    assert (batch[:, 1:] == batch[:, :-1] + 1).all()


def test_batches_continue_from_a_saved_state_across_epochs():
    text = torch.randint(256, (500,), generator=torch.Generator().manual_seed(0))
    one, two = (Batches(text, 20, 8, seed=3) for _ in range(2))
    for _ in range(4):  # an epoch is 24 windows: the position is in the second one
        one.next()
    two.restore(one.state())
    for _ in range(5):
        assert torch.equal(one.next(), two.next())


def test_seed_decides_the_order():
    text = torch.arange(4000) % 256
    first = [Batches(text, 16, 8, seed).next() for seed in (0, 0, 1)]
    assert torch.equal(first[0], first[1]) and not torch.equal(first[0], first[2])


def test_text_of_exactly_one_window():
    batches = Batches(torch.arange(17), context=16, batch=2, seed=0)
    assert batches.next().shape == (2, 17)


def test_validation_windows_are_fixed_and_spread():
    text = torch.arange(1000)
    batches = list(validation_batches(text, context=9, batch=4, count=10))
    starts = torch.cat(batches)[:, 0]
    assert len(starts) == 10 and starts[0] == 0 and starts[-1] == 990
