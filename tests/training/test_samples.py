"""The order of streamed samples, which exact resume and process counts rest on as well."""

import itertools
import shutil
import threading
import time

import datasets
import nibabel as nib
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch.utils.data

from anodiff.data.prepare import prepare
from anodiff.data.prepared import StreamedSplit, load_prepared
from anodiff.data.readers.subjects import Subject
from anodiff.training.loop import fit
from anodiff.training.objective_noise import NoiseObjective
from anodiff.training.options import DataOptions, LoopOptions, TrainOptions
from anodiff.training.samples import PositionBatches, SampleStream, StreamedSamples, read_ahead, read_batches
from anodiff.volumes.processor import VolumeProcessor


LENGTH = 18  # slices, in four files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three subjects of six slices, in half precision."""
    root = tmp_path_factory.mktemp("streamed")
    subjects = []
    for number in range(3):
        volume = np.random.default_rng(number).uniform(1, 9, (8, 8, 6)).astype(np.float32)
        nib.save(nib.Nifti1Image(volume, np.eye(4)), root / f"{number}.nii.gz")
        subjects.append(Subject(f"s{number}", {"t1": root / f"{number}.nii.gz"}, split="train"))
    processor = VolumeProcessor(modalities=("t1",), size=(8, 8))
    assert prepare(subjects, processor, root / "set", recipe={}, progress=False, shard_rows=5, dtype="float16") == {}
    return root / "set"


@pytest.fixture(scope="module")
def split(folder):
    return load_prepared(folder, "train", streaming=True)


@pytest.fixture
def rows(folder, tmp_path, monkeypatch):
    """`rows(batches)`: row numbers of batches of images."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    images = load_prepared(folder, "train")[:]["image"]
    number = {image.tobytes(): row for row, image in enumerate(images)}
    assert len(number) == LENGTH
    return lambda batches: [number[image.tobytes()] for batch in batches for image in batch["image"]]


def samples(split, batches, seed=0, buffer_size=7):
    return list(StreamedSamples(split, seed, buffer_size, batches))


def test_a_streamed_split_describes_itself(folder, split):
    assert isinstance(split, StreamedSplit) and len(split) == LENGTH
    assert split.subjects == ["s0", "s1", "s2"] and split.modalities == ("t1",)
    assert split.processor_settings["size"] == [8, 8] and set(split.subject_info) == {"s0", "s1", "s2"}


@pytest.mark.parametrize("buffer_size", [1, 7, 1000])
def test_every_pass_has_every_slice_once_in_an_order_of_its_own(split, rows, buffer_size):
    # 12 batches of 5: not a divisor of the length, so that batches reach over the ends of passes.
    batches = samples(split, PositionBatches(0, 12, 5, 1, 1, 0), buffer_size=buffer_size)
    assert batches[0]["image"].shape == (5, 1, 8, 8) and batches[0]["image"].dtype == np.float32
    assert np.concatenate([batch["position"] for batch in batches]).tolist() == list(range(60))
    order = rows(batches)
    passes = [order[start : start + LENGTH] for start in (0, LENGTH, 2 * LENGTH)]
    assert all(sorted(one) == list(range(LENGTH)) for one in passes)
    assert len({tuple(one) for one in [*passes, range(LENGTH)]}) == 4
    again = samples(split, PositionBatches(0, 12, 5, 1, 1, 0), buffer_size=buffer_size)
    assert rows(again) == order
    other = samples(split, PositionBatches(0, 12, 5, 1, 1, 0), seed=1, buffer_size=buffer_size)
    assert rows(other) != order


@pytest.mark.parametrize(("batch_size", "accumulation", "processes"), [(3, 4, 1), (3, 2, 2), (2, 2, 3)])
def test_a_step_sees_the_same_slices_however_it_is_divided(split, rows, batch_size, accumulation, processes):
    whole = rows(samples(split, PositionBatches(0, 5, 12, 1, 1, 0)))
    found = {}
    for process in range(processes):
        mine = samples(split, PositionBatches(0, 5, batch_size, accumulation, processes, process))
        positions = np.concatenate([batch["position"] for batch in mine]).tolist()
        found.update(zip(positions, rows(mine), strict=True))
    assert [found[position] for position in range(60)] == whole


@pytest.mark.parametrize("first_step", [1, 5, 9])
def test_going_on_is_as_if_nothing_had_happened(split, rows, first_step):
    whole = rows(samples(split, PositionBatches(0, 12, 4, 1, 1, 0)))
    assert rows(samples(split, PositionBatches(first_step, 12, 4, 1, 1, 0))) == whole[4 * first_step :]


def test_passes_before_the_first_sample_are_not_read():
    class Numbers:
        """Five slices; every pass counts from ten times its number."""

        begun = []

        def __len__(self):
            return 5

        def count_rows(self, population):
            return 5

        def shuffled_rows(self, seed, buffer_size, columns, population):
            assert columns == ("image",) and population == "all"
            self.begun.append((seed, buffer_size))
            yield from ({"image": np.full((1, 1, 1), 10 * seed[1] + row)} for row in range(5))

    found = samples(Numbers(), PositionBatches(4, 6, 3, 1, 1, 0), seed=8)
    assert [batch["image"].ravel().tolist() for batch in found] == [[22, 23, 24], [30, 31, 32]]
    assert Numbers.begun == [([8, 2], 7), ([8, 3], 7)]


def test_other_columns_come_along(folder, split):
    columns = ("image", "mask", "brain", "label")
    whole = load_prepared(folder, "train")[:]
    number = {image.tobytes(): row for row, image in enumerate(whole["image"])}
    positions = PositionBatches(0, 3, 6, 1, 1, 0)
    streamed = StreamedSamples(split, 0, 7, positions, columns)
    stored = SampleStream(load_prepared(folder, "train"), 0, columns)
    for batch in (*streamed, *(stored.__getitems__(part) for part in positions)):
        assert set(batch) == {*columns, "position"}
        rows = [number[image.tobytes()] for image in batch["image"]]
        for name in columns:
            np.testing.assert_array_equal(batch[name], whole[name][rows])


def test_known_anomalies_are_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    subjects = []
    for number in range(3):
        volume = np.random.default_rng(number).uniform(1, 9, (8, 8, 6)).astype(np.float32)
        mask = np.zeros((8, 8, 6), np.uint8)
        mask[4:6, 4:6, :number] = 1
        for name, array in (("t1", volume), ("mask", mask)):
            nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / f"{number}_{name}.nii.gz")
        files = tmp_path / f"{number}_t1.nii.gz", tmp_path / f"{number}_mask.nii.gz"
        subjects.append(Subject(f"s{number}", {"t1": files[0]}, masks=[files[1]], split="train"))
    processor = VolumeProcessor(modalities=("t1",), size=(8, 8))
    assert prepare(subjects, processor, tmp_path / "set", recipe={}, progress=False, shard_rows=5) == {}
    whole = load_prepared(tmp_path / "set", "train")
    streamed = load_prepared(tmp_path / "set", "train", streaming=True)
    assert whole.count_rows() == streamed.count_rows() == 18
    assert whole.count_rows("healthy") == streamed.count_rows("healthy") == 15
    number = {image.tobytes(): row for row, image in enumerate(whole[:]["image"])}
    positions = list(PositionBatches(0, 3, 5, 1, 1, 0))
    stored = SampleStream(whole, 0, population="healthy")
    for batches in (
        [stored.__getitems__(part) for part in positions],
        list(StreamedSamples(streamed, 0, 7, positions, population="healthy")),
    ):
        rows = [number[image.tobytes()] for batch in batches for image in batch["image"]]
        assert sorted(rows) == np.flatnonzero(whole.labels == 0).tolist()


def test_a_stream_has_the_types_of_a_stored_set(folder, split, rows):
    columns = ("image", "mask", "annotations", "brain", "label")
    whole, batches = load_prepared(folder, "train"), PositionBatches(0, 2, 5, 1, 1, 0)
    for batch in StreamedSamples(split, 0, 7, batches, columns):
        stored = whole.read_rows(rows([batch]), columns)
        assert {*stored, "position"} == {*batch}
        for name, values in stored.items():
            assert values.dtype == batch[name].dtype, name
            np.testing.assert_array_equal(values, batch[name])


def test_a_worker_reads_the_same(split, rows):
    expected = rows(samples(split, PositionBatches(0, 6, 5, 1, 1, 0)))
    stream = StreamedSamples(split, 0, 7, PositionBatches(0, 6, 5, 1, 1, 0))
    loader = torch.utils.data.DataLoader(stream, batch_size=None, num_workers=1, collate_fn=lambda batch: batch)
    assert rows(loader) == expected


def test_reading_ahead():
    made = [threading.Event() for _ in range(4)]

    def batches():
        for number, event in enumerate(made):
            event.set()
            yield number
        raise ConnectionError("it broke off")

    threads, found = threading.active_count(), []
    with pytest.raises(ConnectionError, match="it broke off"):
        for batch in read_ahead(batches()):
            found.append(batch)
            # The next one is made meanwhile, but no more than that.
            assert batch == 3 or made[batch + 1].wait(30)
            assert not any(event.is_set() for event in made[batch + 2 :])
    assert found == [0, 1, 2, 3]
    assert list(read_ahead(range(3))) == [0, 1, 2] and list(read_ahead([])) == []
    ahead = read_ahead(itertools.count())
    assert next(ahead) == 0
    ahead.close()
    for _ in range(3000):
        if threading.active_count() == threads:
            break
        time.sleep(0.01)
    assert threading.active_count() == threads


def test_missing_files_and_rows(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "set")
    last = tmp_path / "set" / "data" / "train-00003-of-00004.parquet"
    pq.write_table(pq.read_table(last).slice(0, 2), last)
    with pytest.raises(ValueError, match="hold 17 rows where subjects.parquet says 18"):
        samples(load_prepared(tmp_path / "set", "train", streaming=True), PositionBatches(0, 2, 9, 1, 1, 0))
    stream = load_prepared(tmp_path / "set", "train", streaming=True)
    last.unlink()
    message = r"A stream broke off: FileNotFoundError: .*\. Checkpoints are unharmed: `--train.resume latest` goes on"
    for workers in (0, 1):
        stumbling = StreamedSamples(stream, 0, 7, PositionBatches(0, 1, 9, 1, 1, 0))
        with pytest.raises(ConnectionError, match=f"^{message}") as raised:
            list(read_batches(torch.utils.data.DataLoader(stumbling, batch_size=None, num_workers=workers)))
        assert "Traceback" not in str(raised.value)
    with pytest.raises(ValueError, match="set is incomplete: the split train has 3 files in data/ instead of 4"):
        load_prepared(tmp_path / "set", "train", streaming=True)
    for number in range(2):
        shutil.copy(
            last.with_name("train-00000-of-00004.parquet"), last.with_name(f"train-0000{number}-of-00002.parquet")
        )
    with pytest.raises(ValueError, match="set holds files of several versions: .* has 5 files in data/ instead of "):
        load_prepared(tmp_path / "set", "train", streaming=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "phantom-mini"}, "`data.streaming` is for a folder .* got the phantom 'phantom-mini'"),
        ({"num_workers": 2}, "`data.num_workers` must be 0 or 1 with `data.streaming`, got 2"),
        ({"shuffle_buffer": 0}, "`data.shuffle_buffer` must be an integer of at least 1, got 0"),
    ],
)
def test_what_streaming_cannot_do(folder, tmp_path, options, message):
    data = DataOptions(**{"path": str(folder), "streaming": True, **options})
    loop = LoopOptions(output_dir=str(tmp_path / "out"), report_to="none")
    with pytest.raises(ValueError, match=message):
        fit(TrainOptions(data=data, train=loop), NoiseObjective)
