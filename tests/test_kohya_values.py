"""0, false and "" for each of kohya's options: what happens is what the table says, and the command line agrees with a file."""

from __future__ import annotations

import pytest

from library.errors import UserError
from library.options.given import NEEDED, VERBATIM, markers
from library.options.network import TrainNetworkOptions
from library.options.parser import fields_of, flatten
from tests.test_network_options import OPTIONS, parsed
from tests.tools.kohya_values import VALUES, here, rows

ROWS = {row["option"]: row for row in rows()}

# What kohya's code tests for truth ("if args.x:"), or takes a zero of for off.
TRUTH = """v_pred_like_loss min_snr_gamma scale_weight_norms noise_offset ip_noise_gamma multires_noise_iterations resume
lr_scheduler_type save_last_n_epochs_state save_last_n_steps_state save_n_epoch_ratio sample_every_n_steps sample_every_n_epochs"""


def test_the_table_has_every_option_of_kohya() -> None:
    assert list(ROWS) == [option.name for option in OPTIONS]


@pytest.mark.parametrize("option", list(ROWS))
def test_the_table_says_what_happens(option: str) -> None:
    found = {f"here at {name}": here(option, text) for name, text in VALUES.items()}
    told = {name: ROWS[option][name] for name in found}
    assert found == told, "run python -m tests.tools.kohya_values"


def test_what_is_off_in_kohya_is_off_here() -> None:
    """default: of what kohya has off, this program has something on; see the table of differences."""
    assert {name for name, row in ROWS.items() if row["kohya at 0"] == "off"} >= set(TRUTH.split())
    for name, row in ROWS.items():
        for value in VALUES:
            if row[f"kohya at {value}"] == "off":
                assert row[f"here at {value}"] in ("off", "0", "default", "not read in a file"), name


OFF_AT_ZERO = """v_pred_like_loss min_snr_gamma scale_weight_norms noise_offset ip_noise_gamma multires_noise_iterations
adaptive_noise_scale save_every_n_epochs save_every_n_steps save_n_epoch_ratio save_last_n_epochs save_last_n_steps
save_last_n_epochs_state save_last_n_steps_state sample_every_n_steps sample_every_n_epochs max_train_epochs clip_skip
validate_every_n_steps validate_every_n_epochs initial_step max_token_length lr_scheduler_timescale early_stop"""


@pytest.mark.parametrize("option", OFF_AT_ZERO.split())
@pytest.mark.parametrize("zero", ["0", "0.0", "None"])
def test_a_zero_on_the_command_line_is_off_too(option: str, zero: str) -> None:
    assert flatten(parsed(f"--{option}", zero))[option] is None
    assert flatten(parsed(f"--{option}={zero}"))[option] is None


@pytest.mark.parametrize(
    "option", sorted(name for name, kind in fields_of(TrainNetworkOptions).items() if kind is not bool)
)
def test_an_empty_value_on_the_command_line_is_not_given(option: str) -> None:
    marks = markers(fields_of(TrainNetworkOptions)[option])
    blanks = [] if VERBATIM in marks else [[f"--{option}", "  "], [f"--{option}=\t"]]
    for words in ([f"--{option}="], [f"--{option}", ""], *blanks):
        if NEEDED in marks:
            with pytest.raises(UserError, match=rf"^{option} is empty"):
                parsed(*words)
        else:
            assert flatten(parsed(*words)) == flatten(parsed())
