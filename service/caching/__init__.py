"""Answers that are given once more: what may be kept, under which name, in which form, and who asks first.

    policy    what a call and its caller's headers want of the cache, and the entry's name
    entries   an answer as bytes that a store keeps
    whole     which answers are good enough to keep; a whole answer from the events of a stream
    replay    the events of a stream from a whole answer
    flights   equal calls at the same time: one asks, the others wait
    answers   all of these together, as the request path uses them
    lookups   the same for the service's own slow look-ups

No input or output: the stores are behind `ports.Cache` and `flights.Locks`.
"""
