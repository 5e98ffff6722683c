"""Token shards, training batches and validation batches against a slow reading of the same files."""
import re
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import FakeWorld, LateMeter, random_tokens, read_slowly, small_run, write_shard, write_shards
from hypothesis import given, settings
from hypothesis import strategies as st

import train_gpt2_mod as script
from launch import assert_same, checkpoints, column, content_of, records, steps


def loaders(shards, run, lookahead, size):
    return [script.DistributedDataLoader(shards, run, lookahead, FakeWorld(rank, size)) for rank in range(size)]


def step_of(loaders, run):
    """The rows (T + lookahead tokens each, as lists) of one step of all processes, micro-batches in turn."""
    rows = []
    for _ in range(run.grad_accumulation_steps // len(loaders)):
        for loader in loaders:
            rows += rows_of(*loader.next_batch(), run)
    return rows


def rows_of(x, targets, run):
    """The rows that a batch was cut from; checks on the way that all its parts are of one row and have their shape."""
    lookahead = len(targets)
    assert list(targets) == [f"target_{k}" for k in range(1, lookahead + 1)]
    for tensor in (x, *targets.values()):
        assert tensor.shape == (run.batch_size, run.sequence_length) and tensor.dtype == torch.int64
    rows = torch.cat((x, *(target[:, -1:] for target in targets.values())), dim=1)
    for k, target in enumerate(targets.values(), 1):
        assert torch.equal(target, rows[:, k : k + run.sequence_length])
    return rows.tolist()


def naive_steps(tokens, run, lookahead, permutation=None):
    """All steps of one epoch, as lists of rows: sequence i starts at token iT, a step takes the next B x micro-batches,
    and the epoch ends before the first step that does not fit."""
    T, per_step = run.sequence_length, run.batch_size * run.grad_accumulation_steps
    steps, used = [], 0
    while (used + per_step) * T + lookahead <= len(tokens):
        numbers = range(used, used + per_step)
        numbers = numbers if permutation is None else [permutation[i] for i in numbers]
        steps.append([tokens[i * T : i * T + T + lookahead] for i in numbers])
        used += per_step
    return steps


@pytest.mark.parametrize("lookahead", [1, 2, 3, 4])
@pytest.mark.parametrize("size, micro_batches", [(1, 1), (1, 3), (2, 2), (2, 4), (3, 3), (4, 8)])
def test_batches_are_the_shards_read_slowly(tmp_path, size, micro_batches, lookahead):
    """Over shards of odd lengths, three of them shorter than a row; two epochs and a bit."""
    lengths = (37, 1, 3, 2, 101, 64, 5)
    shards = script.TokenShards(write_shards(tmp_path, *(random_tokens(n, seed=n) for n in lengths)))
    run = small_run(batch_size=2, sequence_length=7, grad_accumulation_steps=micro_batches)
    epoch = naive_steps(read_slowly(tmp_path), run, lookahead)
    processes = loaders(shards, run, lookahead, size)
    for expected in (epoch * 3)[: 2 * len(epoch) + 1]:
        assert step_of(processes, run) == expected


def test_a_row_may_span_three_shards(tmp_path):
    shards = script.TokenShards(write_shards(tmp_path, [1, 2, 3], [4, 5], [6, 7, 8, 9]))
    run = small_run(batch_size=1, sequence_length=7)
    x, targets = script.DistributedDataLoader(shards, run, 2, FakeWorld()).next_batch()
    assert x.tolist() == [[1, 2, 3, 4, 5, 6, 7]]
    assert targets["target_1"].tolist() == [[2, 3, 4, 5, 6, 7, 8]]
    assert targets["target_2"].tolist() == [[3, 4, 5, 6, 7, 8, 9]]


def test_shards_read_any_range(tmp_path):
    shards = script.TokenShards(write_shards(tmp_path, *(random_tokens(n, seed=n) for n in (1, 4, 2, 1, 7))))
    tokens = read_slowly(tmp_path)
    assert shards.total == len(tokens) == 15
    for start in range(15):
        for count in range(1, 16 - start):
            piece = shards.read(start, count)
            assert piece.dtype == np.int64 and piece.tolist() == tokens[start : start + count]


def test_shards_join_in_the_order_of_their_names(tmp_path):
    for name, token in (("b.bin", 2), ("a.bin", 1), ("c.bin", 3)):
        write_shard(tmp_path / name, [token])
    assert script.TokenShards(str(tmp_path / "*.bin")).read(0, 3).tolist() == [1, 2, 3]


@pytest.mark.parametrize("spare, steps", [(-1, 2), (0, 3), (1, 3), (41, 3), (42, 4)])
def test_an_epoch_drops_no_more_than_its_last_partial_step(tmp_path, spare, steps):
    """A step is 2 x 3 x 7 = 42 tokens, and its last row needs two more."""
    run = small_run(batch_size=2, sequence_length=7, grad_accumulation_steps=3)
    shards = script.TokenShards(write_shards(tmp_path, list(range(3 * 42 + 2 + spare))))
    (loader,) = loaders(shards, run, 2, 1)
    firsts = [step_of([loader], run)[0][0] for _ in range(steps + 1)]
    assert firsts == [42 * i for i in range(steps)] + [0]


def shuffled_steps(shards, run, size, count):
    processes = loaders(shards, run, 1, size)
    return [step_of(processes, run) for _ in range(count)]


def test_shuffle_permutes_the_rows(tmp_path):
    tokens = list(range(30 * 5 + 1))  # a row's first token says which row it is
    shards = script.TokenShards(write_shards(tmp_path, tokens))
    run = small_run(batch_size=2, sequence_length=5, grad_accumulation_steps=3, shuffle=True)
    steps = shuffled_steps(shards, run, 1, 10)
    numbers = [[row[0] // 5 for row in step] for step in steps]
    assert all(row == tokens[row[0] : row[0] + 6] for step in steps for row in step)
    first, second = sum(numbers[:5], []), sum(numbers[5:], [])
    assert sorted(first) == sorted(second) == list(range(30))
    assert first != list(range(30)) and first != second
    other = shuffled_steps(shards, replace(run, seed=1), 1, 5)
    assert [row[0] // 5 for step in other for row in step] != first
    next_seed = shuffled_steps(shards, replace(run, seed=run.seed + 1), 1, 5)
    assert [row[0] // 5 for step in next_seed for row in step] != second  # an order of its own, none of this seed's
    assert shuffled_steps(shards, run, 3, 10) == steps == shuffled_steps(shards, run, 1, 10)
    finer = replace(run, batch_size=1, grad_accumulation_steps=6)
    assert shuffled_steps(shards, finer, 2, 10) == steps


def test_shuffle_takes_all_rows_where_the_last_step_is_partial(tmp_path):
    """7 rows in steps of 2: three steps of an epoch, which leave out one row, not always the same."""
    shards = script.TokenShards(write_shards(tmp_path, list(range(7 * 5 + 4))))
    run = small_run(batch_size=2, sequence_length=5, shuffle=True)
    steps = shuffled_steps(shards, run, 1, 30)
    left_out = set()
    for epoch in range(10):
        taken = [row[0] // 5 for step in steps[3 * epoch : 3 * epoch + 3] for row in step]
        assert len(set(taken)) == 6
        left_out |= set(range(7)) - set(taken)
    assert len(left_out) > 2


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("before, after, batch_after", [(1, 1, 2), (1, 2, 2), (4, 1, 2), (2, 4, 1), (2, 1, 4)])
def test_a_saved_cursor_continues_exactly(tmp_path, before, after, batch_after, shuffle):
    """Over an epoch's end, on another number of processes, in other micro-batches of as many sequences a step."""
    shards = script.TokenShards(write_shards(tmp_path, random_tokens(200), random_tokens(97, seed=1)))
    run = small_run(batch_size=2, sequence_length=7, grad_accumulation_steps=4, shuffle=shuffle)
    resumed = replace(run, batch_size=batch_after, grad_accumulation_steps=8 // batch_after)
    processes, states, steps = loaders(shards, run, 2, before), [], []
    for _ in range(16):
        states.append(processes[0].state_dict())
        assert all(loader.state_dict() == states[-1] for loader in processes)
        steps.append(step_of(processes, run))
    assert {state["epoch"] for state in states} == {0, 1, 2}
    processes = loaders(shards, resumed, 2, after)
    for i in range(13):
        for loader in processes:
            loader.load_state_dict(states[i])
        assert [step_of(processes, resumed) for _ in range(3)] == steps[i : i + 3]
        assert i == 12 or processes[0].state_dict() == states[i + 3]


def test_the_cursor_moves_with_whole_steps(tmp_path):
    shards = script.TokenShards(write_shards(tmp_path, random_tokens(100)))
    run = small_run(batch_size=2, sequence_length=7, grad_accumulation_steps=2)
    (loader,) = loaders(shards, run, 1, 1)
    states = [loader.state_dict()]
    for _ in range(8):
        loader.next_batch()
        states.append(loader.state_dict())
    cursors = [(0, 0), (0, 0), (0, 28), (0, 28), (0, 56), (0, 56), (0, 84), (1, 0), (1, 28)]
    assert states == [dict(epoch=epoch, tokens=tokens) for epoch, tokens in cursors]


def test_a_given_state_is_not_the_loaders_own(tmp_path):
    shards = script.TokenShards(write_shards(tmp_path, random_tokens(100)))
    (loader,) = loaders(shards, small_run(), 1, 1)
    state = loader.state_dict()
    loader.next_batch()
    assert state == dict(epoch=0, tokens=0) != loader.state_dict()


@pytest.mark.parametrize("lookahead", [1, 3])
def test_a_step_larger_than_the_data_is_refused(tmp_path, lookahead):
    run = small_run(batch_size=2, sequence_length=7, grad_accumulation_steps=3)
    fits = script.TokenShards(write_shards(tmp_path, random_tokens(42 + lookahead)))
    assert len(step_of(loaders(fits, run, lookahead, 1), run)) == 6
    small = script.TokenShards(write_shards(tmp_path, random_tokens(42 + lookahead - 1)))
    with pytest.raises(script.DataError, match=r"step of 42 tokens.*larger than.*lower --batch_size") as error:
        loaders(small, run, lookahead, 1)
    assert run.input_bin in str(error.value)


def validation_rows(shards, run, lookahead, size):
    """All batches of all processes in the order of the data: [(x row, [target rows])], and the sum of their counts."""
    found, total = [], 0
    for rank in range(size):
        batches = script.validation_batches(shards, run, lookahead, FakeWorld(rank, size))
        for i, (x, targets, count) in enumerate(batches):
            for tensor in (x, *targets.values()):
                assert tensor.shape == (run.val_batch_size, run.sequence_length) and tensor.dtype == torch.int64
            assert x.min() >= 0
            assert count == (targets["target_1"] != script.IGNORED).sum() > 0
            total += count
            found.append((i * size + rank, x.tolist(), [target.tolist() for target in targets.values()]))
    rows = []
    for _, x, targets in sorted(found):
        rows += zip(x, *targets)
    return rows, total


def check_validation(folder, shards, run, lookahead, size):
    """Position p, token p of the shards, has target p + 1 exactly once, up to val_tokens or the end; what is not a
    target is IGNORED; a further target, where it is not IGNORED, is the token so far ahead."""
    tokens = read_slowly(folder)
    wanted = min(run.val_tokens, len(tokens) - 1)
    rows, total = validation_rows(shards, run, lookahead, size)
    assert total == wanted
    T = run.sequence_length
    for i, (x, target_1, *further) in enumerate(rows):
        positions = range(i * T, min(i * T + T, wanted))
        if len(positions):
            assert x[: len(positions)] == tokens[positions.start : positions.stop]
        assert target_1 == [tokens[p + 1] for p in positions] + [script.IGNORED] * (T - len(positions))
        for k, target in enumerate(further, 2):
            for p, token in zip(range(i * T, i * T + T), target):
                assert token == script.IGNORED or token == tokens[p + k]
                assert (token != script.IGNORED) or p + k > wanted
    assert len(rows) % run.val_batch_size == 0 and len(rows) * T >= wanted


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("val_tokens", [1, 8, 50, 56, 64, 96, 97, 10_000])
def test_validation_has_each_target_once(tmp_path, val_tokens, batch, size):
    """Sequences of 8: fewer targets than a sequence, not a multiple of it, a multiple, all, more than there are."""
    shards = script.TokenShards(write_shards(tmp_path, *(random_tokens(n, seed=n) for n in (40, 1, 2, 55))))
    run = small_run(val_tokens=val_tokens, val_batch_size=batch)
    check_validation(tmp_path, shards, run, 3, size)


def test_validation_takes_batch_size_where_no_other_is_given(tmp_path):
    shards = script.TokenShards(write_shards(tmp_path, random_tokens(100)))
    batches = list(script.validation_batches(shards, small_run(batch_size=3), 1, FakeWorld()))
    assert {tuple(x.shape) for x, _, _ in batches} == {(3, 8)}


shapes = st.fixed_dictionaries(dict(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=5), batch=st.integers(1, 4), T=st.integers(1, 12),
    size=st.integers(1, 4), turns=st.integers(1, 3), lookahead=st.integers(1, 4), val_tokens=st.integers(1, 250),
    shuffle=st.booleans(),
))


@settings(max_examples=150)
@given(shapes)
def test_any_shape(shape):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = script.TokenShards(write_shards(folder, *(random_tokens(n, seed=n) for n in shape["lengths"])))
        tokens = read_slowly(folder)
        run = small_run(batch_size=shape["batch"], sequence_length=shape["T"], val_batch_size=shape["batch"],
                        grad_accumulation_steps=shape["turns"] * shape["size"], val_tokens=shape["val_tokens"],
                        shuffle=shape["shuffle"])
        check_validation(folder, shards, run, shape["lookahead"], shape["size"])
        epoch = naive_steps(tokens, run, shape["lookahead"])
        if not epoch:
            with pytest.raises(script.DataError):
                loaders(shards, run, shape["lookahead"], shape["size"])
            return
        processes = loaders(shards, run, shape["lookahead"], shape["size"])
        for expected in [*epoch, epoch[0]]:
            rows = step_of(processes, run)
            if not run.shuffle:
                assert rows == expected
            for row in rows:
                starts = range(0, len(tokens) - len(row) + 1, run.sequence_length)
                assert any(tokens[start : start + len(row)] == row for start in starts)


def test_a_pattern_without_a_file_says_how_to_get_some(tmp_path):
    with pytest.raises(script.DataError, match=r"no file matches '.*nothing_\*\.bin'; .*data/\w+\.py"):
        script.TokenShards(str(tmp_path / "nothing_*.bin"))


BAD_SHARDS = {
    "another magic": (dict(magic=1), r"not a token shard .*data/prepare\.py"),
    "another version": (dict(version=2), r"version 2.* reads version 1; "),
    "too long a count": (dict(count=4), r"truncated or corrupt: 4 tokens by its header, 3 by its length; .*again"),
    "too short a count": (dict(count=2), r"truncated or corrupt: 2 tokens by its header, 3 by its length; .*again"),
    "a negative count": (dict(count=-3), r"truncated or corrupt: -3 tokens by its header, 3 by its length; .*again"),
}


@pytest.mark.parametrize("header, message", BAD_SHARDS.values(), ids=BAD_SHARDS)
def test_a_bad_header_is_a_data_error(tmp_path, header, message):
    write_shards(tmp_path, [1, 2])
    bad = write_shard(tmp_path / "part_001.bin", [1, 2, 3], **header)
    with pytest.raises(script.DataError, match=message) as error:
        script.TokenShards(str(tmp_path / "part_*.bin"))
    assert str(bad) in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_no_shards_are_data_errors(tmp_path):
    path = write_shard(tmp_path / "a.bin", [1, 2, 3])
    content = path.read_bytes()
    cases = {b"": "not a token shard", content[:1000]: "not a token shard", content[:1028]: "truncated or corrupt",
             content + b"\0": "truncated or corrupt", content[:1029]: "truncated or corrupt"}
    for bad, message in cases.items():
        path.write_bytes(bad)
        with pytest.raises(script.DataError, match=message) as error:
            script.TokenShards(str(path))
        assert str(path) in str(error.value) and ";" in str(error.value)
    write_shard(path, [])
    with pytest.raises(script.DataError, match="holds no tokens; remove it"):
        script.TokenShards(str(path))
    path.unlink()
    path.mkdir()
    with pytest.raises(script.DataError, match=r"cannot be read \(.*\); ") as error:
        script.TokenShards(str(path))
    assert str(path) in str(error.value)


def test_header_word_three_is_the_vocabulary(tmp_path):
    pattern = write_shards(tmp_path, [1], [2], vocab_size=257)
    assert script.TokenShards(pattern).vocab_size == 257
    write_shards(tmp_path, [1], [2], vocab_size=0)
    assert script.TokenShards(pattern).vocab_size == 50257
    write_shard(tmp_path / "part_000.bin", [1], vocab_size=50257)  # said outright
    assert script.TokenShards(pattern).vocab_size == 50257


def test_shards_of_two_vocabularies_do_not_mix(tmp_path):
    pattern = write_shards(tmp_path, [1], [2])
    write_shard(tmp_path / "part_001.bin", [2], vocab_size=257)
    with pytest.raises(script.DataError, match=r"vocabularies \[257, 50257\]; narrow") as error:
        script.TokenShards(pattern)
    assert pattern in str(error.value)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_an_id_past_the_vocabulary_is_found_with_its_place(tmp_path, size):
    pattern = write_shards(tmp_path, [0, 256], [1] * 5, [5, 6, 257, 300], [256], vocab_size=257)
    shards, found = script.TokenShards(pattern), []
    for rank in range(size):
        try:
            shards.check_ids(rank, size)
        except script.DataError as e:
            found.append(str(e))
    assert len(found) == 1
    assert "part_002.bin" in found[0] and "token 2 is 257, past the vocabulary of 257; make" in found[0]


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 100])
def test_ids_are_checked_in_pieces(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(script, "CHECKED_TOKENS", piece)
    for place in range(9):
        pattern = write_shards(tmp_path, [256], [0] * place + [257] + [300] * (8 - place), vocab_size=257)
        with pytest.raises(script.DataError, match=rf"part_001\.bin: token {place} is 257, past the vocabulary of 257"):
            script.TokenShards(pattern).check_ids()
    script.TokenShards(write_shards(tmp_path, [256] * 9, [0] * 9, vocab_size=257)).check_ids()


def test_ids_within_the_vocabulary_pass(tmp_path):
    script.TokenShards(write_shards(tmp_path, [0, 256], [256], vocab_size=257)).check_ids()
    with pytest.raises(script.DataError, match="token 1 is 50257, past the vocabulary of 50257"):
        script.TokenShards(write_shards(tmp_path, [0, 50257], [50256])).check_ids()


# Shards that go while they are in use


def cut_short(path, tokens):
    path.write_bytes(path.read_bytes()[: 1024 + 2 * tokens])


def test_a_shard_that_is_cut_short_while_in_use_is_named_with_the_token(tmp_path):
    shards = script.TokenShards(write_shards(tmp_path, list(range(5)), list(range(5, 15))))
    cut_short(tmp_path / "part_001.bin", 4)
    assert shards.read(0, 9).tolist() == list(range(9))
    assert shards.read_shard(1, 1, 3).tolist() == [6, 7, 8]
    said = r"part_001\.bin was cut short while in use: its token %d is gone; make or fetch it again"
    for read in (lambda: shards.read(8, 2), lambda: shards.read_shard(1, 2, 3)):
        with pytest.raises(script.DataError, match=said % 4):
            read()
    cut_short(tmp_path / "part_001.bin", 0)
    with pytest.raises(script.DataError, match=said % 0):
        shards.check_ids()
    (tmp_path / "part_001.bin").unlink()
    said = r"part_001\.bin cannot be read any more \(No such file or directory\); bring it back"
    with pytest.raises(script.DataError, match=said):
        shards.read(5, 1)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("micro_batches, size", [(1, 1), (2, 1), (4, 2), (3, 1)])
@pytest.mark.parametrize("damage", [Path.unlink, lambda path: cut_short(path, 3)], ids=["gone", "cut short"])
def test_what_cannot_be_read_is_known_two_steps_before_it_is_missed(tmp_path, micro_batches, size, shuffle, damage):
    """What was read ahead is given out as if nothing had happened, with its cursors; brought back, the loader goes on
    from the last of them."""
    pattern = write_shards(tmp_path, *(random_tokens(150, seed=seed) for seed in range(3)))
    run = small_run(grad_accumulation_steps=micro_batches, shuffle=shuffle)
    expected, per_step = [], micro_batches // size
    loader, undisturbed = (script.DistributedDataLoader(script.TokenShards(pattern), run, 2, FakeWorld(size - 1, size))
                           for _ in range(2))
    for _ in range(8 * per_step):
        expected.append((rows_of(*undisturbed.next_batch(), run), undisturbed.state_dict()))
    given = [(rows_of(*loader.next_batch(), run), loader.state_dict()) for _ in range(per_step)]
    whole = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for path in whole:
        damage(path)
    assert loader.error is None
    with pytest.raises(script.DataError, match=r"part_00\d\.bin (cannot be read any more|was cut short)"):
        while len(given) < len(expected):
            given.append((rows_of(*loader.next_batch(), run), loader.state_dict()))
            assert isinstance(loader.error, script.DataError)  # from the first batch on
    assert given == expected[: len(given)] and len(given) >= 3 * per_step
    assert loader.state_dict() == given[-1][1]
    for path, content in whole.items():
        path.write_bytes(content)
    loader.load_state_dict(given[2 * per_step - 1][1])
    assert loader.error is None
    again = [(rows_of(*loader.next_batch(), run), loader.state_dict()) for _ in range(6 * per_step)]
    assert again == expected[2 * per_step :]


@pytest.mark.parametrize("flags", ["", "--grad_accumulation_steps 2", "--shuffle"])
@pytest.mark.parametrize("meter", [script.Meter, LateMeter])
def test_a_run_whose_shards_go_ends_saved_and_goes_on_when_they_are_back(trainer, monkeypatch, meter, flags):
    monkeypatch.setattr(script, "Meter", meter)
    flags = ["--num_iterations", 10, "--val_loss_every", 0, *flags.split()]
    whole = trainer.run(*flags).folder
    shards, step = {path: path.read_bytes() for path in trainer.data.glob("train_*")}, script.train_step

    def train_step(model, state, *others):
        if state.step == 3:
            for path in shards:
                path.unlink(missing_ok=True)
        return step(model, state, *others)

    with monkeypatch.context() as patch:
        patch.setattr(script, "train_step", train_step)
        result = trainer.main(*trainer.flags(*flags))
    assert result.code == 2 and result.err.count("\n") == 1
    path, ended = re.fullmatch(r"error: (\S+) cannot be read any more \(No such file or directory\); bring it back: "
                               r"training ended after step (\d+), saved as .*/step00000\d\.pt\n", result.err).groups()
    assert path in map(str, shards) and 4 <= int(ended) <= 6
    assert checkpoints(result.folder) == [f"step00000{ended}.pt"]
    assert column(steps(result.folder), "step") == list(range(1, int(ended) + 1))
    refused = trainer.main("--resume", result.folder)
    assert refused.code == 2 and "no file matches" in refused.err
    for path, content in shards.items():
        path.write_bytes(content)
    assert trainer.main("--resume", result.folder).code == 0
    assert column(steps(result.folder), "train_loss") == column(steps(whole), "train_loss")
    assert column(records(result.folder), "step") == column(records(whole), "step")
    for part in ("model", "optimizer", "loader"):
        assert_same(content_of(result.folder, 10)[part], content_of(whole, 10)[part], part)


def test_shards_that_go_when_nothing_more_is_needed_of_them_end_no_run(trainer, monkeypatch):
    """In the ninth step of ten: the tenth has been read, and only what would come after it is missed."""
    step = script.train_step

    def train_step(model, state, *others):
        if state.step == 8:
            for path in trainer.data.glob("train_*"):
                path.unlink()
        figures = step(model, state, *others)
        assert (state.loader.error is not None) == (state.step >= 8)
        return figures

    monkeypatch.setattr(script, "train_step", train_step)
    folder = trainer.run("--num_iterations", 10, "--val_loss_every", 0).folder
    assert column(steps(folder), "step") == list(range(1, 11)) and checkpoints(folder) == ["step000010.pt"]
