"""What hospitals have: tables, lists, DICOM and NIfTI, large sets, and how each is refused."""

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    EnhancedSRStorage,
    ExplicitVRLittleEndian,
    SecondaryCaptureImageStorage,
    SegmentationStorage,
    generate_uid,
)
from typer.testing import CliRunner

from medistill.cli import app
from medistill.data import decode, load, near, shortcuts
from medistill.data.dicom import read_instance, read_series
from medistill.data.files import Rule, fitted, read, read_picture, windowed
from medistill.data.nifti import read_volume
from medistill.data.source import Source
from medistill.data.table import Item, classes_of
from medistill.errors import DataError, MedistillError, RunRefused, UsageError
from medistill.sets import Card, RealSet, Splits

SECRET = "Zebedee^Quixote"
Pixels = np.ndarray


def noise(number: int, *shape: int) -> Pixels:
    return np.random.default_rng(number).integers(0, 256, shape or (12, 12), dtype=np.uint8)


def picture(path: Path, number: int = 0, *shape: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(number, *shape)).save(path)
    return path


def table(path: Path, rows: list[list[object]], mark: str = ",", **how: Any) -> Path:
    with open(path, "w", newline="", encoding=how.get("encoding", "utf-8")) as file:
        writer = csv.writer(file, delimiter=mark, lineterminator=how.get("end", "\n"))
        writer.writerows(rows)
    return path


def many(folder: Path, n: int = 40, patients: int = 20) -> list[list[object]]:
    """Write pictures and return rows of path, class and patient; a patient has one class."""
    rows: list[list[object]] = []
    for i in range(n):
        picture(folder / "images" / f"{i:03}.png", i)
        patient = i % patients
        rows.append([f"images/{i:03}.png", "ill" if patient % 2 else "well", f"P{patient}"])
    return rows


def said(error: pytest.ExceptionInfo[MedistillError]) -> str:
    """Return the message, which must be one line."""
    text = str(error.value)
    assert "\n" not in text
    return text


# --- rules for all files ------------------------------------------------------------------------


def test_a_window_maps_its_edges_to_the_ends() -> None:
    values = np.array([[-1000.0, -160.0, 40.0, 240.0, 3000.0]])
    assert windowed(values, 40, 400).tolist() == [[0, 0, 32768, 65535, 65535]]


@pytest.mark.parametrize(
    ("shape", "size", "filled"),
    [((1, 10, 20), (20, 20), (5, 15)), ((1, 20, 10), (10, 10), None), ((3, 8, 8), (4, 4), None)],
)
def test_padding_is_black_and_even_and_then_pixels_are_resized(
    shape: tuple[int, ...], size: tuple[int, ...], filled: tuple[int, int] | None
) -> None:
    found = fitted(np.full(shape, 200, np.uint8), Rule(size), "x")
    assert (found.shape, found.dtype) == ((shape[0], *size), np.uint8)
    if filled:
        assert (found[0, filled[0] : filled[1]] == 200).all()
        assert (found[0, : filled[0]] == 0).all()
        assert (found[0, filled[1] :] == 0).all()
    assert (fitted(np.full(shape, 200, np.uint8), Rule(size, fit="stretch"), "x") == 200).all()


def test_halving_averages_blocks_of_volumes_and_keeps_16_bits() -> None:
    volume = np.arange(64, dtype=np.uint16).reshape(1, 4, 4, 4) * 1000
    found = fitted(volume, Rule((2, 2, 2), dims=3), "x")
    expected = volume[0].astype(float).reshape(2, 2, 2, 2, 2, 2).mean((1, 3, 5)).round()
    assert found.dtype == np.uint16
    np.testing.assert_array_equal(found[0], expected)


@pytest.mark.parametrize(
    ("channels", "wanted", "expected"),
    [(1, 3, [10, 10, 10]), (1, 4, [10] * 4), (3, 1, [15]), (4, 3, [10, 20, 0]), (4, 1, [15])],
)
def test_channels_by_rule(channels: int, wanted: int, expected: list[int]) -> None:
    image = np.array([10, 20, 0, 255], np.uint8)[:channels, None, None] + np.zeros((1, 2, 2))
    found = fitted(image.astype(np.uint8), Rule(channels=wanted), "x")
    assert found[:, 0, 0].tolist() == expected  # luma of (10, 20, 0): 2.99 + 11.74 = 14.73


def test_two_channels_have_no_rule() -> None:
    with pytest.raises(DataError, match="found 2 channels; expected 3"):
        fitted(np.zeros((2, 4, 4), np.uint8), Rule(channels=3), "x")


def test_pictures_keep_their_depth_and_channels(tmp_path: Path) -> None:
    deep = np.random.default_rng(0).integers(0, 65536, (5, 6), dtype=np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(read_picture(str(tmp_path / "deep.png"), Rule())[0], deep)
    four = noise(1, 5, 6, 4)
    Image.fromarray(four, "RGBA").save(tmp_path / "four.png")
    np.testing.assert_array_equal(
        read_picture(str(tmp_path / "four.png"), Rule()), np.moveaxis(four, -1, 0)
    )
    Image.fromarray(noise(2, 5, 6)).convert("P").save(tmp_path / "palette.png")
    assert read_picture(str(tmp_path / "palette.png"), Rule()).shape == (3, 5, 6)


# --- csv ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
@pytest.mark.parametrize(
    "how",
    [{}, {"encoding": "utf-16"}, {"encoding": "utf-8-sig"}, {"end": "\r\n"}],
    ids=lambda how: next(iter(how.values()), "plain").strip() or "crlf",
)
def test_a_table_is_read_whatever_its_marks(tmp_path: Path, mark: str, how: dict[str, str]) -> None:
    rows = [["Image", "Diagnosis", "Patient ID"], *many(tmp_path)]
    splits = load(f"csv:{table(tmp_path / 'set.csv', rows, mark, **how)}")
    card = splits.train.card
    assert (card.classes, card.task, card.shape) == (("ill", "well"), "binary", (12, 12))
    assert sum(map(len, splits)) == 40
    groups = [set(part.groups.tolist()) for part in splits if part.groups is not None]
    assert len(set.union(*groups)) == 20
    assert not groups[0] & groups[1] | groups[0] & groups[2] | groups[1] & groups[2]
    by_pixels = {noise(i).tobytes(): i for i in range(40)}
    for part in splits:
        for image, label in zip(part.images, part.labels.tolist(), strict=True):
            number = by_pixels[image.numpy().tobytes()]
            assert card.classes[label] == ("ill" if number % 2 else "well")


def test_splits_and_columns_are_those_that_were_given(tmp_path: Path) -> None:
    rows = many(tmp_path)
    names = ["training", "VAL", "test"]
    more = [[*row, names[i % 3], f"site {i % 2}"] for i, row in enumerate(rows)]
    head = ["a", "b", "c", "d", "e"]
    where = table(tmp_path / "set.csv", [head, *more])
    splits = load(f"csv:{where};path=a;label=b;patient=c;split=d;site=e")
    assert [len(part) for part in splits] == [14, 13, 13]
    assert splits.test.facts["site"].tolist() == [i % 2 for i in range(2, 40, 3)]
    assert torch.equal(splits.test.images[0, 0], torch.from_numpy(noise(2)))


def test_several_labels_from_columns_or_from_one(tmp_path: Path) -> None:
    rows = many(tmp_path)
    flags = [[row[0], int(i % 2 == 0), int(i % 3 == 0), row[2]] for i, row in enumerate(rows)]
    one = table(tmp_path / "a.csv", [["path", "x", "y", "patient"], *flags])
    joined = [
        [row[0], "|".join(n for n, on in zip("xy", row[1:3], strict=True) if on), row[3]]
        for row in flags
    ]
    two = table(tmp_path / "b.csv", [["path", "label", "patient"], *joined])
    first = load(f"csv:{one};label=x|y")
    second = load(f"csv:{two};task=multi-label")
    for a, b in zip(first, second, strict=True):
        assert a.card.task == b.card.task == "multi-label"
        assert torch.equal(a.labels, b.labels)
    total = torch.cat([part.labels for part in first]).sum(0).tolist()
    assert total == [20, 14]


def test_classes_have_an_order() -> None:
    items = [Item(name) for name in ("10", "9", "1")]
    assert classes_of(items) == ("1", "9", "10")
    assert classes_of([Item("b"), Item("a")]) == ("a", "b")
    assert classes_of([Item("b"), Item("a")], ["b", "a", "c"]) == ("b", "a", "c")
    with pytest.raises(DataError, match="found class 'z'"):
        classes_of([Item("z")], ["a"])


def test_an_ordinal_table_keeps_the_order_it_is_told(tmp_path: Path) -> None:
    rows = [
        [path, ["mild", "none", "severe"][i % 3]] for i, (path, *_) in enumerate(many(tmp_path))
    ]
    where = table(tmp_path / "set.csv", [["path", "label"], *rows])
    card = load(f"csv:{where};task=ordinal;classes=none|mild|severe").train.card
    assert (card.task, card.classes) == ("ordinal", ("none", "mild", "severe"))


def test_identical_images_of_two_patients_hold_both_together(tmp_path: Path) -> None:
    rows = many(tmp_path)
    shutil.copy(tmp_path / "images/000.png", tmp_path / "images/001.png")  # P0 and P1
    path = table(tmp_path / "set.csv", [["path", "label", "patient"], *rows])
    where = []
    for seed in range(8):
        splits = load(f"csv:{path}", seed=seed)
        held = [{0, 1} & set(part.groups.tolist()) for part in splits if part.groups is not None]
        assert sorted(map(len, held)) == [0, 0, 2]
        where.append([len(part) for part in held].index(2))
    assert len(set(where)) > 1


# --- datalist -----------------------------------------------------------------------------------


def datalist(folder: Path, **changes: Any) -> Path:
    rows = many(folder)
    entries = [{"image": path, "label": int(name == "ill")} for path, name, _ in rows]
    whole = {"training": entries[:30], "validation": entries[30:35], "test": entries[35:]}
    (folder / "list.json").write_text(json.dumps({**whole, **changes}))
    return folder / "list.json"


def test_a_datalist_keeps_its_splits_and_names(tmp_path: Path) -> None:
    splits = load(f"datalist:{datalist(tmp_path, labels={'0': 'well', '1': 'ill'})}")
    assert [len(part) for part in splits] == [30, 5, 5]
    assert splits.train.card.classes == ("ill", "well")
    assert torch.equal(splits.val.images[0, 0], torch.from_numpy(noise(30)))
    assert splits.val.labels.tolist() == [1, 0, 1, 0, 1]


def test_test_images_without_labels_are_left_out(tmp_path: Path) -> None:
    path = datalist(tmp_path, test=["images/035.png"], validation=[])
    splits = load(str(path))  # a bare path is known by its ending
    assert sum(map(len, splits)) == 30


def test_images_of_nobody_are_not_one_patients(tmp_path: Path) -> None:
    path = datalist(tmp_path, labels={"0": "well", "1": "ill"})
    whole = json.loads(path.read_text())
    for part in ("training", "validation", "test"):
        for entry in whole[part]:
            entry |= {"patient": None, "site": None}
    path.write_text(json.dumps(whole))
    train = load(f"datalist:{path}").train
    assert not train.card.patients
    assert "site" not in train.facts
    assert train.groups is None or len(train.groups.unique()) == len(train)
    whole["training"][3]["label"] = math.nan
    path.write_text(json.dumps(whole))
    with pytest.raises(DataError, match="found label nan"):
        load(f"datalist:{path}")


def test_classes_that_are_equal_numbers_have_one_order() -> None:
    named = [Item(name) for name in ("1.0", "01", "1", "2")]
    assert classes_of(named) == ("01", "1", "1.0", "2")
    assert classes_of([Item("nan"), Item("3"), Item("11")]) == ("11", "3", "nan")


# --- DICOM --------------------------------------------------------------------------------------


def dicom(path: Path, number: int = 0, **changes: Any) -> Path:
    """Write a small CT slice."""
    path.parent.mkdir(parents=True, exist_ok=True)
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = changes.get("SOPClassUID", CTImageStorage)
    meta.MediaStorageSOPInstanceUID = generate_uid()
    data = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    pixels = changes.pop("pixels", noise(number, 16, 16).astype(np.uint16) * 8)
    facts: dict[str, Any] = {
        "SOPClassUID": CTImageStorage,
        "SOPInstanceUID": meta.MediaStorageSOPInstanceUID,
        "SeriesInstanceUID": "1.2.3",
        "PatientID": "17",
        "PatientName": SECRET,
        "Modality": "CT",
        "ImagePositionPatient": [0, 0, float(number)],
        "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
        "InstanceNumber": 100 - number,
        "PhotometricInterpretation": "MONOCHROME2",
        "RescaleSlope": 2,
        "RescaleIntercept": -1000,
        "WindowCenter": 500,
        "WindowWidth": 2000,
        **changes,
    }
    for name, value in facts.items():
        if value is not None:
            setattr(data, name, value)
    if pixels is not None:
        data.Rows, data.Columns = pixels.shape[-2:]
        data.SamplesPerPixel = 1
        data.BitsAllocated = data.BitsStored = 16
        data.HighBit, data.PixelRepresentation = 15, 0
        if pixels.ndim == 3:
            data.NumberOfFrames = len(pixels)
        data.PixelData = pixels.astype("<u2").tobytes()
    data.save_as(path, enforce_file_format=True)
    return path


def hospital(folder: Path, patients: int = 8, slices: int = 3) -> Path:
    """Write two classes of series, a patient each, files without an ending."""
    for p in range(patients):
        for s in range(slices):
            where = folder / ("ill" if p % 2 else "well") / f"p{p}" / f"IM{slices - s}"
            uid, person = f"1.2.{p + 1}", f"N{p}"
            pixels = noise(100 * p + s, 16, 16).astype(np.uint16) * 8
            dicom(where, s, SeriesInstanceUID=uid, PatientID=person, pixels=pixels)
    return folder


def test_slices_are_rescaled_windowed_and_ordered_by_position(tmp_path: Path) -> None:
    splits = load(f"dicom:{hospital(tmp_path / 'scans')}")
    train = splits.train
    assert train.card.classes == ("ill", "well")
    assert (train.images.dtype, train.card.shape, train.card.modality) == (
        torch.uint16,
        (16, 16),
        "CT",
    )
    groups = [set(part.groups.tolist()) for part in splits if part.groups is not None]
    assert [len(g) * 3 for g in groups] == [len(part) for part in splits]
    first = int(train.groups[0])  # type: ignore[index]
    order = sorted(range(8), key=lambda p: (p % 2 == 0, p))  # as folders are walked
    stored = noise(100 * order[first], 16, 16).astype(float) * 8
    expected = ((stored * 2 - 1000 - (500 - 1000)) / 2000).clip(0, 1)
    np.testing.assert_allclose(train.images[0, 0].numpy() / 65535, expected, atol=1e-5)
    second = noise(100 * order[first] + 1, 16, 16).astype(float) * 8
    expected = ((second * 2 - 500) / 2000).clip(0, 1)
    np.testing.assert_allclose(train.images[1, 0].numpy() / 65535, expected, atol=1e-5)


def test_a_volume_is_its_slices_in_order(tmp_path: Path) -> None:
    volumes = load(f"dicom:{hospital(tmp_path / 'scans')};dims=3")
    assert volumes.train.card.shape == (3, 16, 16)
    slices = load(f"dicom:{tmp_path / 'scans'}")
    assert torch.equal(volumes.train.images[0, 0], slices.train.images[:3, 0])


def test_the_window_of_the_option_comes_before_that_of_the_header(tmp_path: Path) -> None:
    path = dicom(tmp_path / "a.dcm")
    stored = noise(0, 16, 16).astype(float) * 16 - 1000
    for option, (center, width) in {None: (500, 2000), (0.0, 100.0): (0, 100)}.items():
        found = read(str(path), Rule(window=option))
        expected = ((stored - center + width / 2) / width).clip(0, 1)
        np.testing.assert_allclose(found[0] / 65535, expected, atol=1e-5)
        turned = dicom(tmp_path / "b.dcm", PhotometricInterpretation="MONOCHROME1")
        inverse = read(str(turned), Rule(window=option))
        np.testing.assert_allclose(inverse[0] / 65535, 1 - expected, atol=2e-5)


def test_window_and_spacing_are_flags_too(tmp_path: Path) -> None:
    nifti(tmp_path / "a" / "1.nii.gz", np.random.default_rng(0).normal(40, 90, (12, 12, 12)))
    for number in range(4):
        for name in ("a", "b"):
            values = np.random.default_rng(number).normal(40, 90, (12, 12, 12))
            nifti(tmp_path / name / f"{number}.nii.gz", values)
    source = f"nifti:{tmp_path};dims=3;size=8x8x8"
    option = f"{source};window=40,400;spacing=2"
    told = [
        CliRunner().invoke(app, ["data", "inspect", *words, "--json"]).stdout
        for words in ([option], [source, "--window", "40,400", "--spacing", "2"], [source])
    ]
    assert told[0] == told[1] != told[2]
    bad = CliRunner().invoke(app, ["data", "inspect", source, "--window", "wide"])
    assert bad.exit_code in (2, 3)
    assert "window" in bad.stderr


def test_without_a_window_percentiles_of_the_whole_series(tmp_path: Path) -> None:
    from medistill.data.dicom import Series, read_header

    paths = [dicom(tmp_path / f"{i}.dcm", i, WindowCenter=None, WindowWidth=None) for i in range(3)]
    headers = tuple(read_header(str(path)) for path in paths)
    found = read_series(Series(headers, Rule()))
    stored = np.stack([noise(i, 16, 16) for i in range(3)]).astype(float) * 16 - 1000
    low, high = np.percentile(stored, [0.5, 99.5])
    expected = ((stored - low) / (high - low)).clip(0, 1)
    np.testing.assert_allclose(found[:, 0] / 65535, expected, atol=1e-4)


def test_frames_of_one_file_are_slices(tmp_path: Path) -> None:
    for p in range(6):
        pixels = np.stack([noise(10 * p + s, 16, 16) for s in range(2)]).astype(np.uint16)
        name = "ill" if p % 2 else "well"
        dicom(
            tmp_path / name / f"{p}.dcm",
            SeriesInstanceUID=f"1.{p}",
            PatientID=str(p),
            pixels=pixels,
        )
    splits = load(f"dicom:{tmp_path}")
    assert sum(map(len, splits)) == 12


def test_series_that_lost_their_numbers_keep_patients_apart(tmp_path: Path) -> None:
    """One number for all series: what a patient's images become is the same without the others."""

    def written(folder: Path, patients: int) -> list[bytes]:
        for p in range(patients):
            pixels = noise(p, 16, 16).astype(np.uint16) * (4 + p)
            where = folder / ("ill" if p % 2 else "well") / f"{p}.dcm"
            gone = {"WindowCenter": None, "WindowWidth": None}
            dicom(where, p, SeriesInstanceUID="1", PatientID=f"N{p}", pixels=pixels, **gone)
        splits = load(f"dicom:{folder};by=image")
        assert splits.train.card.patients
        return sorted({image.numpy().tobytes() for part in splits for image in part.images})

    all_of_them, fewer = (written(tmp_path / str(n), n) for n in (12, 11))
    assert set(fewer) < set(all_of_them)


def test_images_that_share_a_window_depend_on_each_other(tmp_path: Path) -> None:
    """A series without a patient has one window: no promise for single slices of it."""
    for p in range(8):
        for s in range(2):
            where = tmp_path / ("ill" if p % 2 else "well") / f"p{p}" / f"{s}.dcm"
            pixels = noise(10 * p + s, 16, 16).astype(np.uint16)
            dicom(where, s, SeriesInstanceUID=f"1.{p}", PatientID=None, pixels=pixels)
    shared = load(f"dicom:{tmp_path};deal=each;label=folder").train.depends
    assert shared.startswith("what the slices of a series share")
    source = f"dicom:{hospital(tmp_path / 'named', 60, 2)};deal=each"
    named = load(f"{source};label=folder").train
    assert not named.depends
    assert named.card.patients
    # By slice, the window of a patient's slice hangs on those that fell to other splits.
    assert "share" in load(f"{source};label=folder;by=image").train.depends
    # One file beside the folders, and modalities would be classes.
    assert load(source).train.depends.startswith("labels whose place")


def test_files_of_several_kinds_name_no_rule_that_the_first_decides(tmp_path: Path) -> None:
    rows: list[list[object]] = [["path", "label"]]
    for n in range(30):
        path = tmp_path / f"{n}.{'dcm' if n == 29 else 'png'}"
        if n == 29:
            dicom(path, pixels=noise(n, 16, 16).astype(np.uint16))
        else:
            Image.fromarray(noise(n, 16, 16).astype(np.uint16) * 99).save(path)
        rows.append([path.name, "ab"[n % 2]])
    alone = load(f"csv:{table(tmp_path / 'one.csv', rows[:-1])};deal=each").train
    assert not alone.depends
    mixed = load(f"csv:{table(tmp_path / 'two.csv', rows)};deal=each").train
    assert "files of several kinds" in mixed.depends


def test_the_first_file_does_not_decide_whether_all_are_volumes(tmp_path: Path) -> None:
    """With a window of their own slices and volumes have one rule of intensities."""
    rows: list[list[object]] = [["path", "label"]]
    dicom(tmp_path / "first.dcm", pixels=noise(99, 8, 8).astype(np.uint16))
    rows.append(["first.dcm", "a"])
    for n in range(30):
        nifti(tmp_path / f"{n}.nii", noise(n, 64, 8).reshape(8, 8, 8).astype(np.float32))
        rows.append([f"{n}.nii", "ab"[n % 2]])
    options = ";size=8;window=40,400;deal=each"
    with_it = load(f"csv:{table(tmp_path / 'one.csv', rows)}{options}").train
    assert with_it.card.shape == (8, 8)
    assert "files of several kinds" in with_it.depends
    without = load(f"csv:{table(tmp_path / 'two.csv', [rows[0], *rows[2:]])}{options}").train
    assert without.card.shape == (8, 8, 8)
    assert not without.depends


def test_colors_of_a_palette_and_deep_ones_are_colors(tmp_path: Path) -> None:
    palette = {"PhotometricInterpretation": "PALETTE COLOR"}
    for name, values in (("Red", [0, 10, 200]), ("Green", [0, 20, 100]), ("Blue", [0, 30, 50])):
        palette[f"{name}PaletteColorLookupTableDescriptor"] = [3, 0, 16]  # type: ignore[assignment]
        table_ = np.array(values, "<u2") * 257
        palette[f"{name}PaletteColorLookupTableData"] = table_.tobytes()  # type: ignore[assignment]
    numbers = np.array([[0, 1], [2, 1]], np.uint16)
    path = dicom(tmp_path / "palette.dcm", pixels=numbers, **palette)
    found = read_instance(str(path), Rule())
    assert found.dtype == np.uint8
    assert found[:, 0, 1].tolist() == [10, 20, 30]
    assert found[:, 1, 0].tolist() == [200, 100, 50]
    data = pydicom.dcmread(dicom(tmp_path / "deep.dcm"))
    data.SamplesPerPixel, data.PlanarConfiguration = 3, 0
    data.PhotometricInterpretation, data.BitsStored, data.HighBit = "RGB", 12, 11
    deep = np.zeros((16, 16, 3), "<u2")
    deep[0, 0] = 4095, 2048, 16
    data.PixelData = deep.tobytes()
    data.save_as(tmp_path / "deep.dcm")
    found = read_instance(str(tmp_path / "deep.dcm"), Rule())
    assert found[:, 0, 0].tolist() == [255, 128, 1]


@pytest.mark.parametrize("frames", ["2000000000", "-3"])
def test_a_count_of_frames_that_cannot_be_is_refused(tmp_path: Path, frames: str) -> None:
    hospital(tmp_path / "scans")
    path = tmp_path / "scans" / "ill" / "p1" / "IM1"
    data = pydicom.dcmread(path)
    data.NumberOfFrames = frames
    data.save_as(path)
    with pytest.raises(DataError, match="NumberOfFrames"):
        load(f"dicom:{tmp_path / 'scans'}")


def test_a_volume_without_the_organ_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(7):
        organs(tmp_path, number)
    nifti(tmp_path / "labels" / "6.nii.gz", np.zeros((24, 24, 24), np.uint8))
    splits = load(f"nifti:{tmp_path / 'images'};labels={tmp_path / 'labels'};size=8")
    groups = [set(part.groups.tolist()) for part in splits if part.groups is not None]
    assert sum(map(len, groups)) == 6
    assert "left out 1 volume(s) without a label" in capsys.readouterr().err


def test_a_damaged_volume_is_one_line(tmp_path: Path) -> None:
    image, labels = organs(tmp_path)
    content = bytearray(image.read_bytes())
    content[30:2000] = bytes(1970)
    image.write_bytes(content)
    with pytest.raises(DataError, match=str(image)):
        load(f"nifti:{image};labels={labels};size=8;by=image;window=0,100")


def test_header_risks_are_found(tmp_path: Path) -> None:
    from medistill.data import inspect

    hospital(tmp_path / "scans")
    risky = {
        "BurnedInAnnotation": "YES",
        "SOPClassUID": SecondaryCaptureImageStorage,
        "SeriesInstanceUID": "1.2.1",
        "PatientID": "N0",
    }
    path = dicom(tmp_path / "scans" / "well" / "p0" / "IM9", 9, **risky)
    data = pydicom.dcmread(path)
    data.add_new(0x00091001, "LO", "secret")
    data.add_new(0x60000010, "US", 8)
    data.save_as(path)
    found = {
        one["kind"]: one["count"]
        for one in inspect(load(f"dicom:{tmp_path / 'scans'}"))["findings"]
    }
    for kind in ("burned-in", "secondary-capture", "overlay", "private-tags"):
        assert found[kind] == 1


def test_no_name_of_a_patient_enters_a_run_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEDISTILL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(decode, "IN_MEMORY", 0)
    hospital(tmp_path / "scans")
    source = f"dicom:{tmp_path / 'scans'}"
    run = tmp_path / "run"
    words = ["--method", "dm-bank", "--bank", "1", "--ipc", "1", "--steps", "1"]
    small = ["--backbone", "convnet-1-8"]
    for line in (
        ["distill", source, *words, *small, "--out", str(run)],
        ["evaluate", str(run), "--data", source, "--seeds", "1", "--student-steps", "2"],
        ["report", str(run), "--out", str(tmp_path / "run" / "report.html")],
        ["data", "inspect", source, "--json", "--sheet", str(tmp_path / "run" / "sheet2.png")],
    ):
        result = CliRunner().invoke(app, line)
        assert result.exit_code == 0, result.output
        for name in (*SECRET.split("^"), "N0"):
            assert name not in result.output
    written = [p for top in (run, tmp_path / "cache") for p in top.rglob("*") if p.is_file()]
    assert len(written) > 8
    for path in written:
        content = path.read_bytes()
        for name in SECRET.split("^"):
            assert name.encode() not in content, path
    assert any(
        SECRET.split("^")[0].encode() in p.read_bytes() for p in (tmp_path / "scans").rglob("IM*")
    )


@pytest.mark.data
def test_real_series_become_a_set_of_two_classes(data_root: Path) -> None:
    splits = load(f"dicom:{data_root / 'dicom'};size=32;by=image")
    assert sum(map(len, splits)) == 84
    counts = sum(part.labels.bincount(minlength=2) for part in splits)
    assert counts.tolist() == [20, 64]  # type: ignore[union-attr]
    from monai.data import PydicomReader

    # An independent reader: MONAI stacks the same slices along the same axis.
    reader = PydicomReader()
    array, _ = reader.get_data(reader.read(str(data_root / "dicom" / "ct_series")))
    from medistill.data.dicom import Series, headers_of

    headers = sorted(headers_of(data_root / "dicom" / "ct_series"), key=lambda h: h.place)
    mine = read_series(Series(tuple(headers), Rule(window=(40.0, 400.0))))[:, 0] / 65535
    theirs = ((np.asarray(array).transpose(2, 1, 0) - 40 + 200) / 400).clip(0, 1)
    same = min(np.abs(mine - theirs).max(), np.abs(mine - theirs[::-1]).max())
    assert same < 1e-4


# --- NIfTI --------------------------------------------------------------------------------------


def nifti(path: Path, values: np.ndarray, affine: np.ndarray | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine), path)
    return path


def test_a_volume_is_turned_to_right_anterior_superior(tmp_path: Path) -> None:
    values = np.arange(60, dtype=np.int16).reshape(3, 4, 5)
    plain = read_volume(str(nifti(tmp_path / "a.nii.gz", values)), Rule(dims=3, window=(30, 60)))
    turned = np.diag([-1.0, -1.0, 1.0, 1.0])
    turned[:2, 3] = [2, 3]
    other = nifti(tmp_path / "b.nii", values[::-1, ::-1], turned)
    assert plain.shape == (1, 5, 4, 3)  # superior, anterior, right
    np.testing.assert_array_equal(read_volume(str(other), Rule(dims=3, window=(30, 60))), plain)
    np.testing.assert_allclose(plain[0] / 65535, values.T / 60, atol=1e-4)


def test_spacing_is_resampled(tmp_path: Path) -> None:
    ramp = np.broadcast_to(np.arange(9, dtype=np.float32), (9, 9, 9))
    path = nifti(tmp_path / "a.nii", np.ascontiguousarray(ramp), np.diag([2, 2, 2, 1.0]))
    found = read_volume(str(path), Rule(dims=3, spacing=(4.0,) * 3, window=(4, 8)))
    assert found.shape == (1, 5, 5, 5)  # from 0 to 16 mm in steps of 4
    np.testing.assert_allclose(found[0, :, 2, 2] / 65535 * 8, [0, 2, 4, 6, 8], atol=1e-3)


def organs(folder: Path, number: int = 0) -> tuple[Path, Path]:
    values = np.random.default_rng(number).normal(0, 10, (24, 24, 24)).astype(np.float32)
    labels = np.zeros((24, 24, 24), np.uint8)
    labels[2:10, 2:10, 2:22], labels[14:22, 14:22, 2:22] = 3, 7
    values[labels == 3] += 300
    return (
        nifti(folder / "images" / f"{number}.nii.gz", values),
        nifti(folder / "labels" / f"{number}.nii.gz", labels),
    )


def test_patches_lie_round_their_organ(tmp_path: Path) -> None:
    image, labels = organs(tmp_path)
    splits = load(f"nifti:{image};labels={labels};size=8;by=image;window=150,400")
    card = splits.train.card
    assert (card.classes, card.shape, card.flips) == (("3", "7"), (8, 8), False)
    assert sum(map(len, splits)) == 40  # 20 slices of each
    for part in splits:
        bright = part.images.float().mean((1, 2, 3)) / 65535
        assert torch.equal(bright > 0.6, part.labels == 0)  # (300 - 150 + 200) / 400 = 0.875
    # Round (z, 6, 6) a patch of 20 begins 4 voxels outside the volume: black there.
    wide = load(f"nifti:{image};labels={labels};size=20;by=image;window=0,2000;classes=3|7")
    edge = wide.train.images[wide.train.labels == 0]
    assert (edge[:, 0, :4] == 0).all()
    assert (edge[:, 0, :, :4] == 0).all()
    assert (edge[:, 0, 4:, 4:].float() > 0).all()
    cubes = load(f"nifti:{image};labels={labels};size=8;dims=3;by=image")
    assert cubes.train.card.shape == (8, 8, 8)


def test_each_volume_is_a_patient(tmp_path: Path) -> None:
    for number in range(6):
        organs(tmp_path, number)
    splits = load(f"nifti:{tmp_path / 'images'};labels={tmp_path / 'labels'};size=8")
    groups = [set(part.groups.tolist()) for part in splits if part.groups is not None]
    assert sum(map(len, groups)) == 6
    assert all(groups)


def test_a_map_that_begins_elsewhere_is_told_by_start(tmp_path: Path) -> None:
    image, labels = organs(tmp_path)
    held = nibabel.load(labels)
    few = np.asarray(held.dataobj)[:, :, 4:]
    part = nifti(tmp_path / "part.nii.gz", few)  # its header says that it begins at 0
    told = load(f"nifti:{image};labels={part};size=8;by=image;window=150,400;start=4")
    for one in told:
        bright = one.images.float().mean((1, 2, 3)) / 65535
        assert torch.equal(bright > 0.6, one.labels == 0)
    with pytest.raises(DataError, match="do not fit"):
        load(f"nifti:{image};labels={part};size=8;by=image;start=5")


@pytest.mark.data
def test_organs_of_a_real_scan(data_root: Path) -> None:
    folder = data_root / "nifti"
    whole = load(
        f"nifti:{folder / 'example_ct.nii.gz'};labels={folder / 'example_seg.nii.gz'};start=82;"
        "by=image;classes=1|5|20"
    )
    small = load(
        f"nifti:{folder / 'example_ct_sm.nii.gz'};labels={folder / 'example_seg.nii.gz'};"
        "by=image;classes=1|5|20;window=40,400"
    )
    assert [len(part) for part in whole] == [len(part) for part in small]
    again = load(
        f"nifti:{folder / 'example_ct.nii.gz'};labels={folder / 'example_seg.nii.gz'};start=82;"
        "by=image;classes=1|5|20;window=40,400"
    )
    assert torch.equal(again.train.images, small.train.images)
    # Liver (5) is soft tissue; slices of it are brighter than those of colon (20), which holds air.
    mean = [float(again.train.images[again.train.labels == c].float().mean()) for c in (1, 2)]
    assert mean[0] > mean[1]


# --- broken input -------------------------------------------------------------------------------


def spoil(folder: Path) -> None:
    """Write one of everything that is wrong."""
    rows = many(folder)
    head: list[object] = ["path", "label", "patient"]
    tables: dict[str, list[list[object]]] = {
        "missing": [*rows[:3], ["images/none.png", "ill", "P1"]],
        "twice": [*rows[:3], rows[1]],
        "two-labels": [*rows[:3], [rows[1][0], "well" if rows[1][1] == "ill" else "ill", "P1"]],
        "empty-label": [*rows[:3], ["images/009.png", "", "P1"]],
        "empty-path": [*rows[:3], ["", "ill", "P1"]],
        "ragged": [*rows[:3], ["images/009.png", "ill"]],
        "torn": [*rows[:3], ["images/torn.png", "ill", "P1"]],
        "odd-size": [*rows[:3], ["images/wide.png", "ill", "P1"]],
        "odd-channels": [*rows[:3], ["images/color.png", "ill", "P1"]],
        "one-class": [row for row in rows if row[1] == "ill"],
    }
    for name, body in tables.items():
        table(folder / f"{name}.csv", [head, *body])
    table(folder / "good.csv", [head, *rows])
    table(folder / "bad-split.csv", [[*head, "split"], *[[*row, "fold 3"] for row in rows]])
    table(folder / "flags.csv", [["path", "x", "y"], *[[row[0], "yes", 0] for row in rows]])
    table(folder / "no-label.csv", [["path", "who"], *[row[:2] for row in rows]])
    table(folder / "no-path.csv", [["where", "label"], *[row[:2] for row in rows]])
    text = "path,label\nimages/000.png,ill\n"
    (folder / "utf16.csv").write_bytes(text.encode("utf-16-le"))
    (folder / "latin.csv").write_bytes("path,label\nimages/ü.png,ill\n".encode("latin-1"))
    (folder / "empty.csv").write_text("")
    (folder / "head.csv").write_text("path,label\n")
    whole = (folder / "images/000.png").read_bytes()
    (folder / "images/torn.png").write_bytes(whole[: len(whole) // 2])
    picture(folder / "images/wide.png", 5, 12, 13)
    picture(folder / "images/color.png", 5, 12, 12, 3)
    entries = [{"image": row[0], "label": row[1]} for row in rows[:3]]
    lists: dict[str, Any] = {
        "no-training": {"test": entries},
        "no-image": {"training": [*entries, {"label": 1}]},
        "map": {"training": [*entries, {"image": "images/009.png", "label": "seg.nii.gz"}]},
        "again": {"training": [*entries, entries[0]]},
        "gone": {"training": [*entries, {"image": "none.png", "label": "ill"}]},
        "bool": {"training": [*entries, {"image": "images/009.png", "label": True}]},
    }
    for name, content in lists.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    (folder / "cut.json").write_text('{"training": [')
    good = hospital(folder / "scans", 2, 1)
    whole = dicom(folder / "cut" / "a.dcm").read_bytes()
    (folder / "cut" / "a.dcm").write_bytes(whole[: len(whole) - 200])
    dicom(folder / "blank" / "a.dcm", pixels=None)
    dicom(folder / "seg" / "a.dcm", SOPClassUID=SegmentationStorage, Modality="SEG")
    dicom(folder / "sr" / "a.dcm", SOPClassUID=EnhancedSRStorage, Modality="SR", pixels=None)
    (folder / "junk").mkdir()
    (folder / "junk" / "a.dcm").write_bytes(b"no image at all")
    (folder / "nothing").mkdir()
    (folder / "nothing" / "notes.txt").write_text("words")
    for i, side in enumerate((16, 20)):
        pixels = noise(i, side, side).astype(np.uint16)
        dicom(folder / "mixed" / f"{i}.dcm", i, pixels=pixels)
    dicom(folder / "unnamed" / "a.dcm", Modality=None)
    assert good.is_dir()
    values = np.random.default_rng(0).random((6, 6, 6)).astype(np.float32)
    holed = values.copy()
    holed[0, 0, 0] = np.nan
    nifti(folder / "nan" / "a" / "x.nii.gz", holed)
    nifti(folder / "four" / "a" / "x.nii.gz", np.stack([values, values], -1))
    nifti(folder / "flat" / "a" / "x.nii.gz", values[:, :, 0])
    path = nifti(folder / "short" / "a" / "x.nii", values)
    path.write_bytes(path.read_bytes()[:500])
    (folder / "novolumes" / "a").mkdir(parents=True)
    nifti(folder / "image.nii.gz", values)
    nifti(folder / "soft.nii.gz", values)


BAD = {
    "missing": ("csv:missing.csv", "row 5: found no file", "none.png"),
    "twice": ("csv:twice.csv", "row 5", "stands in row 3 already"),
    "two labels": ("csv:two-labels.csv", "row 5", "with another label"),
    "empty label": ("csv:empty-label.csv", "row 5", "found no label"),
    "empty path": ("csv:empty-path.csv", "row 5", "found no path"),
    "ragged": ("csv:ragged.csv", "row 5", "found 2 cells; expected 3"),
    "torn": ("csv:torn.csv", "row 5", "no whole image"),
    "odd size": ("csv:odd-size.csv", "row 5", "found an image of 1x12x13"),
    "odd channels": ("csv:odd-channels.csv", "row 5", "set size and channels"),
    "one class": ("csv:one-class.csv", "found one class only", "ill"),
    "bad split": ("csv:bad-split.csv", "row 2", "found split 'fold 3'"),
    "flags": ("csv:flags.csv;label=x|y", "row 2", "expected 0 or 1"),
    "no label": ("csv:no-label.csv", "row 1", "expected one named label"),
    "no path": ("csv:no-path.csv", "row 1", "expected one named path"),
    "no table": ("csv:none.csv", "found no table", "none.csv"),
    "utf-16": ("csv:utf16.csv", "utf16.csv", "UTF-16 needs its mark"),
    "latin": ("csv:latin.csv", "latin.csv", "no UTF-8"),
    "empty": ("csv:empty.csv", "empty.csv is empty", "names the columns"),
    "head alone": ("csv:head.csv", "head.csv", "found no image in the list"),
    "no training": ("datalist:no-training.json", "no key 'training'", "no-training.json"),
    "no image": ("datalist:no-image.json", "training[3]", "image path"),
    "map": ("datalist:map.json", "training[3]", "found a label map"),
    "again": ("datalist:again.json", "training[3]", "stands in training[0] already"),
    "gone": ("datalist:gone.json", "training[3]", "found no file"),
    "bool": ("datalist:bool.json", "training[3]", "found label True"),
    "cut list": ("datalist:cut.json", "cut.json is no JSON", "datalist"),
    "cut": ("dicom:cut;by=image", "cut/a.dcm", "no readable pixels"),
    "blank": ("dicom:blank", "blank/a.dcm", "has no pixels"),
    "seg": ("dicom:seg", "seg/a.dcm", "is a Segmentation Storage, no image"),
    "sr": ("dicom:sr", "sr/a.dcm", "is a Enhanced SR Storage, no image"),
    "junk": ("dicom:junk", "junk/a.dcm", "no DICOM file"),
    "nothing": ("dicom:nothing", "found no DICOM files", "nothing"),
    "no folder": ("dicom:none", "found no files below none", "DICOM"),
    "mixed": ("dicom:mixed;by=image", "mixed/1.dcm", "expected one size"),
    "short series": ("dicom:scans;least=5", "no series of 5 slices", "scans"),
    "unnamed": ("dicom:unnamed", "unnamed/a.dcm", "found no Modality"),
    "one patient": ("dicom:mixed;size=8", "found 1 patient(s)", "by=image"),
    "nan": ("nifti:nan", "x.nii.gz", "1 voxels that are not finite"),
    "four": ("nifti:four", "x.nii.gz", "found 6x6x6x2"),
    "flat": ("nifti:flat", "x.nii.gz", "found 6x6"),
    "short": ("nifti:short", "x.nii", "expected a volume"),
    "no volumes": ("nifti:novolumes", "found no volumes", "novolumes"),
    "no map": ("nifti:image.nii.gz;labels=none.nii", "found no file none.nii", "label map"),
    "soft map": ("nifti:image.nii.gz;labels=soft.nii.gz", "soft.nii.gz", "not whole"),
}


@pytest.fixture(scope="module")
def spoiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("spoiled")
    spoil(folder)
    return folder


def listing(folder: Path) -> dict[str, bytes | None]:
    return {str(p): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("name", BAD)
def test_broken_input_is_one_line_with_its_place_and_writes_nothing(
    name: str, spoiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, place, words = BAD[name]
    monkeypatch.chdir(spoiled)
    before = listing(spoiled)
    result = CliRunner().invoke(app, ["distill", source, "--ipc", "1", "--out", "out"])
    assert result.exit_code == 3, result.output
    line = result.stderr.splitlines()[-1]
    assert line.startswith("medistill: ")
    others = [one for one in result.stderr.splitlines()[:-1] if "ignored" not in one]
    assert others == []
    assert place in line
    assert words in line
    assert listing(spoiled) == before


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("csv:good.csv;label=lable", "has no column 'lable': did you mean label?"),
        ("csv:good.csv;size=0", "expected whole sides"),
        ("csv:good.csv;size=8x8x8", "expected size=N or NxN"),
        ("csv:good.csv;fit=crop", "expected pad or stretch"),
        ("dicom:scans;window=40", "expected window=N,N"),
        ("dicom:scans;window=40,0", "expected more than 0"),
        ("dicom:scans;label=PatientName", "expected folder, Modality"),
        ("dicom:scans;by=slice", "expected patient or image"),
        ("dicom:scans;task=sorted", "expected binary, multi-class"),
        ("phantom:task=none", "expected multi-class, ordinal, multi-label"),
        ("phantom:task=ordinal,variation=1", "which has one anatomy"),
    ],
)
def test_wrong_options_are_told(
    source: str, words: str, spoiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(spoiled)
    with pytest.raises(UsageError) as error:
        load(source)
    assert words in said(error)


@pytest.mark.parametrize(
    ("module", "source"), [("pydicom", "dicom:scans"), ("nibabel", "nifti:nan")]
)
def test_a_missing_extra_is_named(
    module: str, source: str, spoiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(spoiled)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UsageError, match=r"medistill\[medical\]"):
        load(source)


# --- large sets ---------------------------------------------------------------------------------


@pytest.fixture
def small_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Let every set be too large for the memory, and the cache lie in a folder of its own."""
    monkeypatch.setattr(decode, "IN_MEMORY", 0)
    monkeypatch.setattr(decode, "CHUNK", 8)
    monkeypatch.setenv("MEDISTILL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "decoded"


def test_a_set_in_a_file_is_that_in_memory(
    tmp_path: Path, small_memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = table(tmp_path / "set.csv", [["path", "label", "patient"], *many(tmp_path)])
    filed = load(f"csv:{path}")
    assert all(part.file is not None for part in filed)
    monkeypatch.setattr(decode, "IN_MEMORY", 2**30)
    for one, other in zip(filed, load(f"csv:{path}"), strict=True):
        assert one.digest == other.digest
        assert torch.equal(one.groups, other.groups)  # type: ignore[arg-type]


def test_decoded_files_are_found_again_until_a_picture_changes(
    tmp_path: Path, small_memory: Path
) -> None:
    path = table(tmp_path / "set.csv", [["path", "label", "patient"], *many(tmp_path)])
    first = load(f"csv:{path}")
    files = {p: p.stat().st_ino for p in small_memory.glob("*.pixels")}
    assert len(files) == 2  # in the order of the table, and split by split
    load(f"csv:{path}")
    assert {p: p.stat().st_ino for p in small_memory.glob("*.pixels")} == files
    picture(tmp_path / "images/000.png", 777)
    changed = load(f"csv:{path}")
    assert first.train.card.digest != changed.train.card.digest
    assert small_memory.stat().st_mode & 0o777 == 0o700


def test_a_decoding_that_was_killed_goes_on(tmp_path: Path, small_memory: Path) -> None:
    rows = many(tmp_path, 400, 400)
    path = table(tmp_path / "set.csv", [["path", "label", "patient"], *rows])
    code = (
        "from medistill.data import decode, load\n"
        "decode.IN_MEMORY = 0; decode.CHUNK = 2\n"
        f"if __name__ == '__main__': load({f'csv:{path}'!r})\n"
    )
    script = tmp_path / "run.py"
    script.write_text(code)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src")}
    process = subprocess.Popen([sys.executable, script], env=env, start_new_session=True)
    end = time.monotonic() + 60
    while not list(small_memory.glob("*.done")) and time.monotonic() < end:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (note,) = small_memory.glob("*.done")
    assert int(note.read_text()) >= 16
    half = note.with_suffix(".half")
    images = np.memmap(half, np.uint8, "r+", shape=(400, 1, 12, 12))
    images[0] = 7  # what was done before the kill is not done again
    images.flush()
    subprocess.run([sys.executable, script], env=env, check=True, timeout=100)
    (done,) = (p for p in small_memory.glob("*.pixels") if "-" not in p.stem)
    whole = np.memmap(done, np.uint8, "r", shape=(400, 1, 12, 12))
    assert (whole[0] == 7).all()
    for i in range(1, 400):
        np.testing.assert_array_equal(whole[i, 0], noise(i))
    assert not list(small_memory.glob("*.half")) + list(small_memory.glob("*.done"))


def test_a_script_without_a_guard_is_told_and_does_not_wait_for_itself(
    tmp_path: Path, small_memory: Path
) -> None:
    path = table(tmp_path / "set.csv", [["path", "label", "patient"], *many(tmp_path)])
    script = tmp_path / "run.py"
    script.write_text(
        f"from medistill.data import decode, load\ndecode.IN_MEMORY = 0\nload({f'csv:{path}'!r})\n"
    )
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1] / "src")}
    words = [sys.executable, str(script)]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=100)
    assert done.returncode != 0
    assert "if __name__ == '__main__':" in done.stderr


def test_old_files_go_and_a_full_disk_is_refused(
    tmp_path: Path, small_memory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = many(tmp_path)
    head: list[object] = ["path", "label", "patient"]
    one = table(tmp_path / "one.csv", [head, *rows])
    two = table(tmp_path / "two.csv", [head, *rows[::-1]])
    size = 40 * 144
    monkeypatch.setenv("MEDISTILL_CACHE_BYTES", str(2 * size))
    load(f"csv:{one}")
    before = set(small_memory.glob("*.pixels"))
    load(f"csv:{two}")
    after = set(small_memory.glob("*.pixels"))
    assert len(before) == len(after) == 2
    assert not before & after
    usage = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(RunRefused, match="found 0 bytes free"):
        load(f"csv:{one};size=8")


# --- near duplicates and shortcuts --------------------------------------------------------------


def smooth(number: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(number)
    coarse = torch.rand(1, 1, 6, 6, generator=draw)
    return torch.nn.functional.interpolate(coarse, (32, 32), mode="bicubic")[0].clamp(0, 1)


def set_of(images: list[torch.Tensor], labels: list[int], **facts: list[int]) -> RealSet:
    card = Card("toy", "binary", ("a", "b"), 1, tuple(images[0].shape[1:]))
    pixels = (torch.stack(images) * 255).round().to(torch.uint8)
    numbers = {name: torch.tensor(values) for name, values in facts.items()}
    return RealSet(pixels, torch.tensor(labels), card, None, numbers)


def test_near_duplicates_are_found_and_others_are_not() -> None:
    originals = [smooth(i) for i in range(40)]
    draw = torch.Generator().manual_seed(0)
    noisy = [(x + 0.02 * torch.randn(x.shape, generator=draw)).clamp(0, 1) for x in originals[:5]]
    brighter = [0.9 * x + 0.09 for x in originals[5:8]]
    train = set_of(originals, [0, 1] * 20)
    val = set_of([*noisy, *brighter, originals[9]], [0] * 9)
    splits = Splits(train, val, set_of([smooth(99)], [0]))
    numbers = torch.arange(50)
    numbers[48] = 9  # identical to image 9: a duplicate, not a near one
    found = set(near.pairs(splits, numbers))
    assert {(i, 40 + i) for i in range(5)} <= found
    brute = set()
    flat = torch.cat([part.images for part in splits]).float() / 255
    small = torch.nn.functional.adaptive_avg_pool2d(flat, 16).flatten(1)
    for i in range(50):
        for j in range(i + 1, 50):
            gap = float((small[i] - small[j]).square().mean().sqrt())
            if gap < near.DIFFERENCE and numbers[i] != numbers[j]:
                brute.add((i, j))
    assert found <= brute
    assert brute == {(i, 40 + i) for i in range(5)}


@pytest.mark.parametrize("kind", ["stored height", "border", "range", "none"])
def test_what_tells_the_class_without_the_picture_is_found(kind: str) -> None:
    def part(start: int, n: int) -> RealSet:
        images, labels = [], [i % 2 for i in range(n)]
        for i, label in enumerate(labels):
            image = 0.2 + 0.5 * smooth(start + i)
            if kind == "border":
                image[:, 0] = image[:, -1] = 0.4 + 0.1 * label  # within the range of the others
            if kind == "range":
                image[:, 16, 16] = 0.9 + 0.1 * label
            images.append(image)
        sides = [512 + (label if kind == "stored height" else 0) for label in labels]
        return set_of(images, labels, **{"stored height": sides})

    splits = Splits(part(0, 80), part(1000, 40), part(2000, 4))
    told = [one["examples"][0].split(" alone")[0] for one in shortcuts.found(splits)]
    names = {
        "stored height": "what was stored",
        "border": "the border",
        "range": "the range of intensities",
    }
    assert told == ([names[kind]] if kind in names else [])


def test_shortcuts_of_many_pixels_are_looked_for_in_pieces() -> None:
    draw = torch.Generator().manual_seed(0)
    wide = torch.randint(0, 256, (24, 1, 1024, 1024), dtype=torch.uint8, generator=draw)
    card = Card("wide", "binary", ("a", "b"), 1, (1024, 1024))
    part = RealSet(wide, torch.arange(24) % 2, card)
    assert len(list(part.blocks())) == 2  # of 2^24 pixels
    assert shortcuts.found(Splits(part, part.take(torch.arange(12)), part)) is not None


def test_sixteen_bits_become_eight_in_a_combined_set(tmp_path: Path) -> None:
    hospital(tmp_path / "scans")
    one = load(f"dicom:{tmp_path / 'scans'}")
    both = load(f"combine:(dicom:{tmp_path / 'scans'}),(phantom:n=40,size=16);labels=keep")
    mine = both.train.images[: len(one.train)].float() / 255
    torch.testing.assert_close(mine, one.train.images.float() / 65535, atol=0.002, rtol=0)
    assert "header's window" in both.train.card.intensity


# --- through every verb -------------------------------------------------------------------------


def through(source: str, run: Path, *words: str) -> dict[str, Any]:
    small = ["--backbone", "convnet-2-8"]
    steps = ["--method", "dm", "--steps", "2", *small, *words]
    result = CliRunner().invoke(app, ["distill", source, *steps, "--out", str(run), "--json"])
    assert result.exit_code == 0, result.output
    words_ = ["evaluate", str(run), "--data", source, "--seeds", "1", "--student-steps", "8"]
    result = CliRunner().invoke(app, [*words_, "--json"])
    assert result.exit_code == 0, result.output
    record: dict[str, Any] = json.loads(result.stdout)
    report = CliRunner().invoke(app, ["report", str(run), "--out", str(run / "page.html")])
    assert report.exit_code == 0, report.output
    return record


SOURCES: dict[str, tuple[Callable[[Path], str], tuple[str, ...]]] = {
    "csv": (
        lambda at: f"csv:{table(at / 's.csv', [['path', 'label', 'patient'], *many(at)])}",
        ("--ipc", "2"),
    ),
    "datalist": (lambda at: f"datalist:{datalist(at)}", ("--ipc", "2")),
    "dicom": (lambda at: f"dicom:{hospital(at / 'scans')}", ("--ipc", "2")),
    "dicom volumes": (lambda at: f"dicom:{hospital(at / 'scans')};dims=3;size=8", ("--ipc", "1")),
    "nifti": (
        lambda at: "nifti:{};labels={};size=8;by=image".format(*organs(at)),
        ("--ipc", "2"),
    ),
    "several labels": (lambda at: "phantom:task=multi-label,classes=3,n=60", ("--images", "7")),
    "ordered": (lambda at: "phantom:task=ordinal,classes=4,n=60", ("--ipc", "2")),
    "not square": (
        lambda at: (
            f"csv:{table(at / 's.csv', [['path', 'label'], *[r[:2] for r in many(at)]])};size=16x24"
        ),
        ("--bytes", "3000"),
    ),
}


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_and_task_goes_through_every_verb(name: str, tmp_path: Path) -> None:
    make, words = SOURCES[name]
    record = through(make(tmp_path), tmp_path / "run", *words)
    for arm in ("random", "synthetic", "full"):
        assert 0 <= record[arm]["accuracy"]["mean"] <= 1
        assert ("kappa" in record[arm]) == (name == "ordered")
    images = json.loads((tmp_path / "run" / "run.json").read_text())["images"]
    assert images == {"several labels": 7, "dicom volumes": 2, "not square": 7}.get(name, images)


@pytest.mark.data
def test_an_unbalanced_set_is_dealt_by_roots(data_root: Path, tmp_path: Path) -> None:
    shutil.unpack_archive(data_root / "mednist" / "mednist.tar.gz", tmp_path)
    top = tmp_path / "mednist"
    rows: list[list[object]] = [["path", "label"]]
    wanted = dict(zip(sorted(os.listdir(top)), (1000, 300, 100, 30, 10, 5), strict=True))
    for name, count in wanted.items():
        rows += [[f"{name}/{file}", name] for file in sorted(os.listdir(top / name))[:count]]
    source = f"csv:{table(top / 'few.csv', rows)};size=28"
    refused = CliRunner().invoke(app, ["distill", source, "--out", str(tmp_path / "no")])
    assert refused.exit_code == 5
    words = ("--ipc", "10", "--budget", "sqrt", "--small", "whole")
    record = through(source, tmp_path / "run", *words)
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["counts"] == sorted(run["counts"], reverse=True)
    assert run["images"] == sum(run["counts"]) <= 60
    assert record["full"]["accuracy"]["mean"] > 0.2


def test_option_numbers_are_read_from_a_source() -> None:
    from medistill.data.files import rule_of

    told = Source("dicom", "x", {"size": "8x16", "window": "40,400", "channels": "3"})
    assert rule_of(told) == Rule((8, 16), 3, "pad", (40.0, 400.0))
    cube = Source("nifti", "x", {"size": "8", "dims": "3", "spacing": "2"})
    assert rule_of(cube) == Rule((8, 8, 8), 0, "pad", None, (2.0, 2.0, 2.0), 3)
