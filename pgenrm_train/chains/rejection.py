"""Rejection sampling: the reasons not to train on a teacher's chain (METHOD §3).

The paper keeps a chain that parses and ranks chosen above rejected.  *Our additions*: the recomputed scores
must agree, weights must sum to 100, and the text must judge the responses.  It must not report a vote that it
knows or guesses.

    parse:<kind> · tie · wrong_ranking · verified_ranking · issue:<name> · label_leak

The complaint before another try depends on the teacher's own answer (`form_problem`), never on the label.  To
learn that the ranking was wrong is to learn the vote, and the next chain would argue backwards from it.
"""

import re
from collections.abc import Sequence

from pgenrm_train.chains.chain import Chain, ParseFailure

WRONG_RANKING, TIE, VERIFIED_RANKING, LABEL_LEAK = "wrong_ranking", "tie", "verified_ranking", "label_leak"
DUPLICATE, NEAR_DUPLICATE = "duplicate", "near_duplicate"
BOILERPLATE, OVER_LENGTH = "boilerplate", "over_length"

# Complaints without the label, for the teacher's next try.
COMPLAINTS = {
    TIE: "two responses share the highest total, and a user who compares them prefers one",
    VERIFIED_RANKING: "the totals rank the responses otherwise than the weighted scores do",
    LABEL_LEAK: "it treats a vote on these responses as known, or mentions an earlier answer; "
    "judge the responses themselves",
    "issue:no_rubric": "the rationale lacks criteria with weights, or a score per response and criterion",
    "issue:weights": "the weights do not sum to 100",
    "issue:score_range": "a score is outside 1 to 10",
    "issue:declared_differs": "a total is not the weighted sum of its scores",
    "issue:trailing_text": "text follows the end marker",
}

# Each leak of a vote has one of these.
_CUES = ("chose", "reject", "truth", "gold", "label", "vote", "pick", "select", "prefer")
_VOTE = re.compile(  # in lower case
    r"\b(?:chosen|rejected)\s(?:response|answer|candidate|reply|completion|option)s?\b"
    r"|\bground[\s-]truth\b|\bgold(?:en|-standard)?\s(?:label|answer|response)\b"
    r"|\bpreference\slabel\b|\bchosen_index\b"
    r"|\b(?:by|per|given|from|with|as|to|see|saw|seen|know|knew|knowing|known|match(?:es|ing)?)"
    r"\sthe\s(?:true\s|correct\s|known\s)?label\b"
    r"|\bthe\s(?:true\s|correct\s)?label\s(?:says|shows|indicates|tells|is\sresponse)\b"
    r"|\blabell?ed\s(?:as\s)?(?:chosen|rejected|preferred|better|worse|the\swinner)\b"
    r"|\b(?:the\suser|the\sperson|they|she|he|who)\s(?:\w{1,12}\s){0,2}"
    r"(?:chose|picked|selected|voted\sfor|upvoted|rejected|preferred)"
    r"\s(?:the\s)?(?:response|answer|candidate|option|first|second)\b"
    r"|\b(?:response|answer|candidate|option)[\s_#]{0,2}[0-9]{1,2}"
    r"\s(?:was|is|has\sbeen|had\sbeen|got|were)\s(?:\w{1,12}\s){0,2}"
    r"(?:chosen|picked|selected|rejected|voted|upvoted|labell?ed)\b"
    r"|\b(?:actual|true|known|real|recorded|given)\svotes?\b"
    r"|\bvote(?:d|s)?\s(?:\w{1,12}\s){0,2}(?:for|against)\s(?:the\s)?(?:response|first|second)\b",
)
_EARLIER_VOTES = re.compile(r"\b(?:pairs?|histor\w+|earlier|previous(?:ly)?|past|prior)\b")
_OWN_ANSWER = re.compile(
    r"\bmy\s(?:last|previous|earlier|first|former)\s(?:answer|ranking|attempt|scores|chain|evaluation)\b"
)
_SENTENCE_END = re.compile(r"[.!?](?=\s|\"|$)|\n|\\n")


def reason_to_reject(chain: Chain | ParseFailure, chosen_index: int, text: str) -> str | None:
    """The first reason of the module's list not to train on the chain in `text`, or None."""
    if isinstance(chain, ParseFailure):
        return f"parse:{chain.kind}"
    chosen = chain.scores[chosen_index]
    others = [score for i, score in enumerate(chain.scores) if i != chosen_index]
    if chosen <= max(others):
        return TIE if chosen == max(others) else WRONG_RANKING
    return form_problem(chain, text)


def form_problem(chain: Chain | ParseFailure, text: str) -> str | None:
    """A problem of an answer that does not depend on the label, or None."""
    if isinstance(chain, ParseFailure):
        return f"parse:{chain.kind}"
    if chain.scores.count(max(chain.scores)) > 1:
        return TIE
    if chain.verified_scores and _winner(chain.verified_scores) != _winner(chain.scores):
        return VERIFIED_RANKING
    if chain.issues:
        return f"issue:{chain.issues[0]}"
    return LABEL_LEAK if leaks_label(text) else None


def complaint(problem: str, chain: Chain | ParseFailure) -> str:
    """The text of a `form_problem` for a teacher."""
    return f"{problem}: {chain.detail if isinstance(chain, ParseFailure) else COMPLAINTS[problem]}"


def leaks_label(text: str) -> bool:
    """Whether the text treats a vote on these responses as known, or mentions its author's earlier answer.

    Sentences on earlier votes are allowed.  Their words mark them (pair, history, earlier, …), so that a leak
    with one of these words passes.
    """
    text = text.lower()
    if "my " in text and _OWN_ANSWER.search(text):
        return True
    if not any(cue in text for cue in _CUES):  # most chains; the pattern is slow
        return False
    suspects = (sentence for sentence in _SENTENCE_END.split(text) if any(cue in sentence for cue in _CUES))
    return any(_VOTE.search(sentence) and not _EARLIER_VOTES.search(sentence) for sentence in suspects)


def _winner(scores: Sequence[float]) -> int | None:
    """Index of the strictly highest score; None for a tie."""
    best = max(scores)
    return scores.index(best) if scores.count(best) == 1 else None
