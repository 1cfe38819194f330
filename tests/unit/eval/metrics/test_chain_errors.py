"""Where chains err: each figure moves with the error that it is named after."""

import pandas as pd
import pytest

from eval.metrics.chain_errors import chain_errors
from pgenrm_train.chains.chain import write_chain

CRITERIA = (("warm", 60.0), ("brief", 25.0), ("formal", 15.0))


def chain(scores=((8, 2, 2), (2, 8, 8)), criteria=CRITERIA):
    return write_chain("A person.", criteria, scores)


def predictions(*texts, order=0):
    rows = [{"pair_id": f"p{n}", "order": order, "text": text} for n, text in enumerate(texts)]
    return pd.DataFrame(rows)


def test_a_right_chain_is_readable_verifiable_and_faithful():
    errors = chain_errors(predictions(chain()))
    assert (errors.chains, errors.readable, errors.verifiable, errors.faithful) == (1, 1.0, 1.0, 1.0)


def test_an_unreadable_chain_stays_in_the_denominator():
    errors = chain_errors(predictions(chain(), None, "no block"))
    assert errors.chains == 3 and errors.readable == pytest.approx(1 / 3) and errors.verifiable == 1.0


def test_a_total_edited_by_hand_is_not_faithful():
    text = chain()
    assert '"response_1": 5.6' in text
    errors = chain_errors(predictions(text, text.replace('"response_1": 5.6', '"response_1": 9.6')))
    assert errors.verifiable == 1.0 and errors.faithful == 0.5


def test_a_chain_without_a_rubric_is_readable_and_not_verifiable():
    verdict = '{"rationale": "I like it", "better_response": {"response_1": 7, "response_2": 3}}'
    bare = f"<JSON_START>{verdict}<JSON_END>"
    errors = chain_errors(predictions(bare))
    assert (errors.readable, errors.verifiable, errors.faithful, errors.heaviest_decides) == (
        1,
        0,
        None,
        None,
    )


def test_the_heaviest_criterion_decides_or_not():
    agreeing = chain(((8, 8, 8), (2, 2, 2)))
    assert chain_errors(predictions(chain())).heaviest_decides == 1.0
    assert chain_errors(predictions(agreeing)).heaviest_decides == 0.0


def test_stability_compares_samples_of_one_question_only():
    other = chain(criteria=(("warm", 60.0), ("brief", 25.0), ("listed", 15.0)))
    samples = pd.concat([predictions(chain()), predictions(other)])
    assert chain_errors(samples).criteria_stability == pytest.approx(2 / 4)
    assert chain_errors(predictions(chain(), other)).criteria_stability is None
    orders = pd.concat([predictions(chain()), predictions(other, order=1)])
    assert chain_errors(orders).criteria_stability is None


def test_no_predictions_give_no_shares():
    errors = chain_errors(predictions("x").iloc[:0])
    assert errors.chains == 0 and errors.readable is None and errors.criteria_stability is None
