"""Neutral prose, written for this project, on which calibrations check that perplexity is kept. No question, opinion or list."""

from __future__ import annotations

__all__ = ["PASSAGES"]

PASSAGES = (
    (
        "The ferry leaves the eastern pier at ten past six, when the water in the harbour is still the colour of "
        "slate. It carries mail, two or three vans and whoever has work on the island that day. The crossing takes "
        "forty minutes in calm weather. On the upper deck there is a row of wooden benches, worn smooth by a century "
        "of coats, and from there one can see the lighthouse turn slowly from white to grey as the boat passes behind "
        "it. By the time the engines slow down, the bakery near the landing has its shutters open and the smell of "
        "bread has reached the quay."
    ),
    (
        "A bicycle wheel is kept round by the tension of its spokes. Each spoke pulls the rim towards the hub, and "
        "because the spokes leave the hub on both sides, the rim is held in place sideways as well. When one of them "
        "is loosened, the rim moves away from it; when it is tightened, the rim moves closer. A mechanic who trues a "
        "wheel spins it between two fixed points, watches where it comes near to one of them, and turns the nipples "
        "of two or three spokes by a quarter of a turn. The work is slow at first. After some years it takes a few "
        "minutes, and the hands know what to do before the eyes have finished looking."
    ),
    (
        "In the spring of that year the town council decided to move the weekly market from the square to the street "
        "along the canal. The square was to be paved again, and the work would last until autumn. The traders "
        "measured their new places with ropes and chalk. Fishmongers were put at the far end, where there was shade "
        "until noon, and the flower stalls stood by the bridge. When the paving was finished in October, a letter "
        "went round with a question on it, and most of those who answered wrote that they would rather stay by the "
        "water. The square has been used for concerts and for parking ever since."
    ),
    (
        "Rain that falls on the high meadows does not run off at once. It sinks into the moss and the peat beneath "
        "it, which can hold many times their own weight, and seeps out again lower down over the following weeks. "
        "That is why the stream in the valley still flows in August, when nothing has fallen for a month. Where the "
        "peat was drained and cut for fuel, the stream rises quickly after every storm and is almost dry a few days "
        "later. Over the last ten years some of the old ditches have been blocked with planks and stones. The moss "
        "has begun to grow over them, and the level of the water changes more slowly again."
    ),
    (
        "The library keeps its maps in a room on the second floor, in cabinets with shallow drawers. Most of them "
        "show the county at a scale of one to ten thousand, sheet by sheet, as it was surveyed at intervals of about "
        "twenty years. Someone who lays three editions of one sheet beside each other can watch a village grow along "
        "its road, a railway line arrive and disappear, and a row of ponds turn into a single lake. The sheets may be "
        "copied but not borrowed. A reader has to give the number of the drawer, wash both hands at the basin beside "
        "the door, and wait until the librarian has laid the map on the table."
    ),
    (
        "To repot a plant that has outgrown its container, water it an hour beforehand so that the root ball holds "
        "together. Turn the pot on its side, support the stem between two fingers and tap the rim against the edge of "
        "a table. The new pot should be no more than a few centimetres wider than the old one, with a hole in its "
        "base. Put in enough soil for the plant to stand at the same height as before, set it in the middle, and fill "
        "the gap around it with more soil, pressing gently. Leave some space below the rim for water. The plant may "
        "look tired for a week; it recovers once the roots have found their way into the fresh soil."
    ),
    (
        "My grandfather repaired clocks in a workshop behind the house. He did not talk while he worked, but he did "
        "not mind being watched, and I spent many afternoons on a stool beside the lathe. Every clock that came in "
        "was given a paper label with a name and a date, and stood on the long shelf until its turn came. Some of "
        "them ticked, each at its own pace, so that the room was never quite silent. When he had put a movement back "
        "into its case he would wind it, set the hands by the radio, and leave it on the shelf for another week "
        "before he wrote to the owner. Only then, he said, did a clock show whether it was mended."
    ),
    (
        "Sound travels through water more than four times as fast as through air, and it travels much farther before "
        "it fades. Low tones in particular can cross a whole ocean basin. There is a layer, several hundred metres "
        "below the surface, in which sound is bent back whenever it begins to stray upwards or downwards, because its "
        "speed depends on temperature and on pressure. An instrument hung in that layer picks up ships that are days "
        "away, the cracking of ice shelves and the calls of whales. Since the speed rises as the water warms, the "
        "time a signal takes between two fixed stations also says something about the temperature of everything in "
        "between."
    ),
)
"""Eight passages of about a hundred words each."""
