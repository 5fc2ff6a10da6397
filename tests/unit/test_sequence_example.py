"""The text example: its pieces, its usage errors, and a short run of the whole."""

import math

import numpy as np
import pytest

import gpulayers as gl
from gpulayers.examples import sequence


def test_usage_errors_say_what_is_wrong(capsys):
    for arguments in (["--steps", "0"], ["--units", "many"], ["--learning-rate", "nan"], ["--nonsense"]):
        with pytest.raises(SystemExit) as error:
            sequence.main(arguments)
        assert error.value.code == 2
    assert "unrecognized arguments: --nonsense" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="unknown device"):
        sequence.main(["--device", "nowhere"])
    with pytest.raises(SystemExit, match="exceeds the text"):
        sequence.main(["--batch-size", "1000000"])


def test_the_alphabet_goes_there_and_back():
    alphabet = sequence.Alphabet("hello hello!" * 3, rare=5)
    assert "!" not in alphabet.known and alphabet.characters(alphabet.numbers("hello!")) == "hello?"


def test_an_untrained_model_without_weights_needs_the_logarithm_of_the_alphabet():
    model = sequence.CharacterModel(8, units=6, depth=2)
    numbers = np.arange(200, dtype=np.int32) % 8
    model(gl.asarray(numbers[None]))
    for variable in model.weights:
        variable.assign(np.zeros(variable.shape))
    assert math.isclose(sequence.bits_per_character(model, numbers, rows=2, window=20), 3, rel_tol=1e-6)


def test_training_learns_a_pattern():
    gl.ops.set_seed(1)
    numbers = np.tile(np.array([0, 1, 2, 3, 4, 5, 6, 7], np.int32), 200)
    model = sequence.CharacterModel(8, units=16, depth=2)
    sequence.train(model, numbers, steps=80, batch=4, window=16, rate=0.02)
    assert sequence.bits_per_character(model, numbers, rows=2, window=50) < 0.2


def test_the_whole_in_short(capsys):
    assert sequence.main(["--steps", "3", "--units", "8", "--batch-size", "4", "--window", "8"]) == 0
    printed = capsys.readouterr().out
    before, after = (float(printed.split(f"held out {word}: ")[1].split()[0]) for word in ("before", "after"))
    assert 0 < after < before < 8 and "a line of its own: The " in printed
