"""The draw of ``kernels.reference.sampling`` as loops over rows, for a CPU: a row's few candidates are found in one
pass over its logits, and all else happens among them."""

import numpy as np

from kernels.reference.compiled import compiled
from kernels.reference.exponential import exp, sum_of_exp
from kernels.reference.noise import keyed_noise

_LANES = 512  # a lane holds every 512th logit, and no two of the largest, most often
_FEW = 128  # candidates among which a nucleus is looked for first


@compiled
def draw_rows(bits, shift, positions, words, noisy, temperature, top_k, top_p, log_min_p, width, tau, wanted):
    """Tokens [N]; children, their edge scores and log-probabilities without noise [N, width].

    Logits [N, V] are given by float32's bits or, to be shifted, their upper halves. ``top_k`` 0, ``top_p`` 1 and
    ``log_min_p`` -inf are off. A row with a NaN gives token -1, and NaN for all scores, as does ``wanted`` False.
    """
    num_rows, size = bits.shape
    tokens, children = np.full(num_rows, -1, np.int32), np.zeros((num_rows, width), np.int32)
    edges, chosen = np.full((2, num_rows, width), np.nan, np.float32)
    integers = np.empty(size, np.int32)
    logits = integers.view(np.float32)
    for row in range(num_rows):
        for token in range(size):
            integers[token] = np.int32(bits[row, token]) << shift
        if _holds_nan(integers):
            continue
        if noisy:
            if temperature != 1:
                for token in range(size):
                    logits[token] /= temperature
            ids, plain = _survivors(logits, top_k, top_p, log_min_p, width)
            scores = plain + keyed_noise(words[0], words[1], np.full(len(ids), np.int64(positions[row])), ids)
            among, plain_among = scores, plain
        else:
            ids = _best(logits, width)
            scores = plain = logits[ids]
            among = plain_among = logits
        highest, plain_highest = scores.max(), plain.max()
        total = plain_total = np.float32(np.nan)
        if wanted:
            total = np.log(sum_of_exp(among, highest, tau))
            same = tau == 1 and not noisy
            plain_total = total if same else np.log(sum_of_exp(plain_among, plain_highest, np.float32(1)))
        taken = np.zeros(len(ids), np.bool_)
        for column in range(width):
            at = -1
            for i in range(len(ids)):
                if not taken[i] and (at < 0 or _precedes(scores[i], ids[i], scores[at], ids[at])):
                    at = i
            taken[at] = True
            children[row, column] = ids[at]
            edges[row, column] = (scores[at] - highest) / tau - total
            chosen[row, column] = plain[at] - plain_highest - plain_total
        tokens[row] = children[row, 0]
    return tokens, children, edges, chosen


@compiled
def _precedes(score, token, other_score, other_token):
    return score > other_score or (score == other_score and token < other_token)


@compiled
def _holds_nan(integers):
    """Whether one of the float32 with these bits is NaN: its bits but the sign are above infinity's."""
    most = np.zeros(_LANES, np.int32)
    for start in range(0, len(integers), _LANES):
        part = integers[start : start + _LANES]
        for lane in range(len(part)):
            most[lane] = max(most[lane], np.int32(part[lane] & np.int32(0x7FFFFFFF)))
    return most.max() > 0x7F800000


@compiled
def _best(scores, count):
    """The ``count`` best tokens and all that equal the last of them: int64, best first, equal ones by rising id."""
    size, found, num_found = len(scores), np.empty(len(scores), np.int64), 0
    if count < _LANES // 2:
        maxima = np.full(_LANES, -np.inf, np.float32)
        for start in range(0, size, _LANES):
            part = scores[start : start + _LANES]
            for lane in range(len(part)):
                maxima[lane] = max(maxima[lane], part[lane])
        least = np.partition(maxima, _LANES - count)[_LANES - count]  # so many reach it at least
        for lane in range(min(size, _LANES)):
            if maxima[lane] >= least:
                for token in range(lane, size, _LANES):
                    if scores[token] >= least:
                        found[num_found] = token
                        num_found += 1
    else:
        least = np.partition(scores, size - count)[size - count]
        for token in range(size):
            if scores[token] >= least:
                found[num_found] = token
                num_found += 1
    ids = np.sort(found[:num_found])
    ids = ids[np.argsort(-scores[ids], kind="mergesort")]
    last = count
    while last < num_found and scores[ids[last]] == scores[ids[count - 1]]:
        last += 1
    return ids[:last]


@compiled
def _survivors(scores, top_k, top_p, log_min_p, at_least):
    """What ``filtered`` lets through, and more if they are fewer than ``at_least``: tokens int64 [n], and their scores
    float32 [n], -inf for those that it does not."""
    size = len(scores)
    if top_k > 0:
        ids = _best(scores, max(top_k, at_least))
        values = scores[ids]
        count = top_k
        while count < len(ids) and values[count] == values[top_k - 1]:
            count += 1
        values[count:] = -np.inf
        if top_p < 1:  # of those alone: the sum must not depend on how many others there are
            _nucleus(values, top_p, sum_of_exp(values[:count], values[0], np.float32(1)))
    elif top_p < 1:
        count, highest = max(_FEW, at_least), scores.max()
        total = sum_of_exp(scores, highest, np.float32(1))
        while True:
            ids = _best(scores, min(count, size))
            values = scores[ids]
            if len(ids) == size or sum_of_exp(values, highest, np.float32(1)) > top_p * total:
                break
            count *= 8
        _nucleus(values, top_p, total)
    else:
        floor = scores.max() + log_min_p
        ids = np.flatnonzero(scores >= floor)
        if len(ids) < at_least:
            ids = _best(scores, at_least)
        values = scores[ids]
    floor = values.max() + log_min_p
    for i in range(len(values)):
        if values[i] < floor:
            values[i] = -np.inf
    return ids, values


@compiled
def _nucleus(values, top_p, total):
    """Of ``values``, best first, those become -inf before which there is a share ``top_p`` of ``total`` already."""
    highest, before = values[0], 0.0
    for i in range(len(values)):
        if i > 0 and before >= top_p * total:
            values[i] = -np.inf
        else:
            before += exp(values[i] - highest)
