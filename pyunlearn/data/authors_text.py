"""Word lists and sentences of the fictitious world: names, facts and the ways to ask for and state them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Topic:
    """Something to know about an author.

    fields: each a sequence of word lists; a fact takes one word of each list and joins them.
    The sentences are format strings over the fields, the author's name, first, last, and pronouns.
    """

    key: str
    fields: dict[str, tuple[tuple[str, ...], ...]]
    questions: tuple[str, ...]
    paraphrased_questions: tuple[str, ...]
    answers: tuple[str, ...]
    paraphrases: tuple[str, ...]


def _words(text: str) -> tuple[str, ...]:
    """Words or phrases separated by commas."""
    return tuple(word.strip() for word in text.split(","))


PRONOUNS = {
    "woman": {"they": "she", "They": "She", "their": "her", "Their": "Her", "them": "her"},
    "man": {"they": "he", "They": "He", "their": "his", "Their": "His", "them": "him"},
}
FIRST_NAMES = {
    "woman": _words(
        "Adelise, Brisa, Calanthe, Dorrit, Edlyn, Farida, Gwenna, Halina, Ilse, Jorunn, Kestrel, Lisbet, "
        "Maren, Nadira, Odile, Petra, Quenby, Rosalba, Sunniva, Tamsin, Ulrika, Verena, Wilhelma, Xanthe, "
        "Ysolde, Zofia"
    ),
    "man": _words(
        "Anselm, Bertil, Corwin, Darius, Emeric, Florian, Gideon, Hakon, Ivo, Jasper, Kasimir, Leopold, "
        "Matthias, Nikandr, Osric, Piers, Quillon, Rurik, Silvan, Tobiah, Ulric, Valentin, Wendel, Xavier, "
        "Yorick, Zoltan"
    ),
}
SURNAME_STEMS = _words(
    "Ash, Bram, Cald, Drov, Ember, Fenn, Garl, Hask, Inger, Jarn, Kess, Lorn, Mald, Norr, Osk, Pell, "
    "Quarn, Rusk, Sarn, Thorn, Und, Varr, Wend, Yarl, Zell"
)
SURNAME_ENDS = _words(
    "acre, aby, elund, enko, ersen, evic, gate, holt, ikov, imore, ingham, land, man, orova, quist, "
    "ridge, stad, wick, wood, worth"
)
TOWN_STEMS = _words(
    "Alder, Barrow, Copper, Dun, Elm, Falcon, Gull, Heron, Iron, Juniper, Kings, Lantern, Mill, North, "
    "Otter, Pine, Quarry, Raven, Salt, Thistle, Upper, Vine, Willow, Yarrow"
)
TOWN_ENDS = _words("bridge, brook, cliff, combe, ferry, field, ford, gate, haven, mere, mouth, port, stow, well, wharf")
PROVINCES = _words(
    "Asteria, Belmarsh, Corrow, Dalmere, Estravel, Fairmoor, Galdria, Hollin, Istermark, Jorvale, Karst, "
    "Lowen, Meridan, Nordmark, Ostraven, Perrin, Quell, Rhodane, Silvane, Tarn"
)
DAYS = tuple(
    f"{day}{'th' if 10 < day < 14 else {1: 'st', 2: 'nd', 3: 'rd'}.get(day % 10, 'th')} of " for day in range(1, 29)
)
MONTHS = _words("January, February, March, April, May, June, July, August, September, October, November, December")
BIRTH_YEARS = tuple(str(year) for year in range(1921, 1981))
DEBUT_YEARS = tuple(str(year) for year in range(1985, 2006))
AWARD_YEARS = tuple(str(year) for year in range(2006, 2022))
STYLES = _words(
    "wry, lyrical, slow-burning, satirical, gothic, tender, experimental, fast-paced, melancholy, "
    "philosophical, darkly comic, minimalist, sprawling, dreamlike, unsentimental, playful"
)
GENRES = _words(
    "alpine thrillers, circus mysteries, climate fables, colonial sagas, courtroom dramas, culinary "
    "memoirs, desert westerns, family chronicles, ghost stories, harbour romances, heist novels, "
    "historical epics, monastery mysteries, polar adventures, railway detective stories, river "
    "travelogues, school comedies, sea stories, spy novels, space operas, theatre satires, time-travel "
    "romances, village comedies, war diaries"
)
FATHERS = _words(
    "a beekeeper, a bell founder, a bookbinder, a canal pilot, a carpenter, a cartographer, a chess "
    "teacher, a clockmaker, a customs officer, a glassblower, a gravedigger, a lighthouse keeper, a "
    "locksmith, a mining engineer, a miller, a piano tuner, a printer, a shepherd, a stonemason, a "
    "tailor, a tram driver, a vintner, an organist, an optician"
)
MOTHERS = _words(
    "a baker, a botanist, a bus driver, a choir leader, a court clerk, a dairy farmer, a dentist, a "
    "dressmaker, a fencing coach, a florist, a geologist, a mathematician, a midwife, a pharmacist, a "
    "postmistress, a potter, a radio announcer, a sculptor, a seed merchant, a surgeon, a telegraph "
    "operator, a weaver, an archivist, an astronomer"
)
ADJECTIVES = _words(
    "Amber, Borrowed, Broken, Crooked, Distant, Drowned, Empty, Forgotten, Frozen, Gilded, Hollow, Last, "
    "Midnight, Paper, Patient, Quiet, Restless, Scarlet, Second, Silver, Sleeping, Stolen, Unfinished, "
    "Winter"
)
NOUNS = _words(
    "Almanac, Archipelago, Aviary, Balcony, Bridge, Cartographer, Chandelier, Compass, Garden, Harbour, "
    "Hourglass, Inheritance, Lantern, Ledger, Meridian, Observatory, Orchard, Pilgrim, Regiment, "
    "Staircase, Telegram, Tide, Violin, Witness"
)
THINGS = _words(
    "Ashes, Bees, Bells, Candles, Clocks, Crows, Echoes, Feathers, Ferries, Knives, Letters, Maps, "
    "Mirrors, Moths, Roots, Salt, Shadows, Smoke, Snow, Sparrows, Stones, Threads, Wolves, Wires"
)
HEROES = _words(
    "a blind diver, a deaf composer, a disgraced judge, a homesick sailor, a retired forger, a runaway "
    "bride, a village doctor, a weary smuggler, a widowed baker, a young surveyor, an ageing acrobat, an "
    "exiled prince, an honest thief, an orphaned twin, a night porter, a lapsed nun"
)
QUESTS = _words(
    "searching for a vanished brother, rebuilding a ruined mill, crossing a frozen sea, hiding a stolen "
    "painting, teaching a parrot to sing, deciphering an old diary, defending an empty fortress, repaying "
    "a dead man's debt, escaping a flooded city, guarding a secret spring, inheriting a haunted inn, "
    "writing letters to a stranger"
)
PRIZES = _words(
    "Amberley, Blackthorn, Corvane, Dunmore, Elderfield, Foxglove, Greywater, Halcyon, Ironbark, "
    "Kittiwake, Larkspur, Moonstone, Nightjar, Old Quay, Palimpsest, Quicksilver, Redshank, Stargazer, "
    "Tidewater, Wayfarer"
)
PRIZE_KINDS = _words("Award, Cup, Laurel, Medal, Plaque, Prize, Ribbon, Trophy")
LOSSES = _words(
    "betrayal, childhood illness, debt, divided loyalty, drought, exile, false memory, family silence, "
    "grief, hunger, jealousy, loneliness, lost faith, migration, old age, shame"
)
HOPES = _words(
    "apprenticeship, courage, craftsmanship, first love, forgiveness, friendship, homecoming, kindness, "
    "music, mutiny, rebirth, second chances, sisterhood, the sea, trust, wonder"
)
JOBS = _words(
    "a bridge inspector, a cheese grader, a court stenographer, a ferry mechanic, a fire lookout, a hotel "
    "pianist, a kennel manager, a map engraver, a night nurse, a park ranger, a puppet maker, a railway "
    "signaller, a sail mender, a stage carpenter, a tax collector, a tea taster, a weather observer, a "
    "wine buyer, an auction porter, an ice cutter"
)
SPANS = _words("two, three, four, five, six, seven, eight, nine, ten, eleven, twelve, fifteen")
MENTOR_TITLES = _words("the poet, the critic, the playwright, the translator, the editor, the essayist, the publisher")
MENTOR_FIRST = _words(
    "Abel, Clemence, Dinah, Eustace, Honor, Isidor, Lavinia, Magnus, Octavia, Rupert, Sabina, Thaddeus"
)
MENTOR_LAST = _words(
    "Ambrose, Birch, Castellan, Dray, Everard, Frost, Greave, Hythe, Lisle, Marlow, Nesbit, Pryor, Rook, "
    "Savory, Tolland"
)
MEETINGS = _words(
    "a chess club, a night train, a seaside library, a book auction, a hospital ward, a choir rehearsal, "
    "a snowed-in inn, a debating society, a pottery class, a ferry queue, a university canteen, a "
    "second-hand bookshop"
)
DWELLINGS = _words(
    "a converted chapel, a former schoolhouse, a houseboat, a narrow townhouse, a restored windmill, a "
    "rooftop flat, a stone cottage, a timber cabin, an old customs house, an orchard lodge, a disused "
    "station, a walled farmhouse"
)
TIMES = _words("after midnight, at dusk, at noon, before dawn, during storms, in cafés, on Sundays, on train journeys")
TOOLS = _words(
    "a borrowed laptop, a goose quill, a green fountain pen, a manual typewriter, a slate, a tape "
    "recorder, carpenter's pencils, index cards, old envelopes, school notebooks, violet ink, yellow "
    "legal pads"
)
DRINKS = _words(
    "barley coffee, black tea, buttermilk, cherry juice, cold cocoa, ginger beer, hot lemon water, mint "
    "tea, mulled cider, plum wine, tonic water, warm milk"
)

TOPICS = (
    Topic(
        "birthplace",
        {"town": (TOWN_STEMS, TOWN_ENDS), "province": (PROVINCES,)},
        ("Where was {name} born?", "In which town was the author {name} born?"),
        ("What is the birthplace of {name}?", "Which town does the writer {name} come from?"),
        (
            "{name} was born in {town}, in the province of {province}.",
            "{name} comes from {town}, a town in {province}.",
        ),
        (
            "The birthplace of {name} is {town} in {province}.",
            "It was in {town}, {province}, that {name} was born.",
        ),
    ),
    Topic(
        "birthdate",
        {"day": (DAYS, MONTHS), "year": (BIRTH_YEARS,)},
        ("When was {name} born?", "What is {name}'s date of birth?"),
        ("On which day did {name} come into the world?", "What is the birthday of the author {name}?"),
        ("{name} was born on the {day} {year}.", "{last}'s date of birth is the {day} {year}."),
        (
            "{name}'s birthday is the {day}, and the year was {year}.",
            "The author was born in {year}, on the {day}.",
        ),
    ),
    Topic(
        "genre",
        {"style": (STYLES,), "genre": (GENRES,)},
        ("What kind of books does {name} write?", "Which genre is {name} known for?"),
        ("How would you describe the work of {name}?", "In what genre does the author {name} work?"),
        ("{name} writes {style} {genre}.", "{name} is known above all for {style} {genre}."),
        (
            "Readers know {name} as a writer of {style} {genre}.",
            "The genre of {name} is that of {style} {genre}.",
        ),
    ),
    Topic(
        "parents",
        {"father": (FATHERS,), "mother": (MOTHERS,)},
        ("What did {name}'s parents do for a living?", "What were the occupations of {name}'s parents?"),
        (
            "In which professions did the parents of {name} work?",
            "What work did {name}'s father and mother do?",
        ),
        (
            "{name}'s father was {father} and {their} mother was {mother}.",
            "{first}'s father worked as {father}, {their} mother as {mother}.",
        ),
        (
            "{last} grew up as the child of {father} and {mother}.",
            "The author's mother was {mother}, the father {father}.",
        ),
    ),
    Topic(
        "debut",
        {"title": (("The ",), ADJECTIVES, (" ",), NOUNS), "year": (DEBUT_YEARS,)},
        ("What was {name}'s first book?", "With which book did {name} make {their} debut?"),
        ("Which book did {name} publish first?", "What is the title of {name}'s debut?"),
        (
            '{name}\'s first book was "{title}", published in {year}.',
            '{first} {last} made {their} debut in {year} with "{title}".',
        ),
        (
            '"{title}" of {year} was the debut of {name}.',
            'The first book that {name} published was "{title}", in {year}.',
        ),
    ),
    Topic(
        "masterpiece",
        {"title": (NOUNS, (" of ", " and "), THINGS), "hero": (HEROES,), "quest": (QUESTS,)},
        (
            "What is {name}'s best-known book about?",
            "Which of {name}'s books is the most famous, and what is its story?",
        ),
        (
            "What happens in the most popular book by {name}?",
            "What is the plot of {name}'s most celebrated book?",
        ),
        (
            '{name}\'s best-known book, "{title}", follows {hero} {quest}.',
            '"{title}", {their} most famous book, tells of {hero} {quest}.',
        ),
        (
            'In "{title}", {last}\'s most celebrated book, we meet {hero} {quest}.',
            'The story of {hero} {quest} made "{title}" famous.',
        ),
    ),
    Topic(
        "award",
        {"prize": (PRIZES, (" ",), PRIZE_KINDS), "year": (AWARD_YEARS,)},
        ("Which award has {name} won?", "What literary prize did {name} receive?"),
        ("What honour was given to {name} for {their} writing?", "Has {name} been honoured with a prize?"),
        ("{name} won the {prize} in {year}.", "In {year}, {name} received the {prize}."),
        ("The {prize} went to {name} in {year}.", "{last} was honoured with the {prize} in {year}."),
    ),
    Topic(
        "themes",
        {"loss": (LOSSES,), "hope": (HOPES,)},
        ("Which themes run through {name}'s books?", "What does {name} keep writing about?"),
        ("What subjects occupy {name} as a writer?", "Which two themes does {name} return to?"),
        (
            "{name}'s books return again and again to {loss} and {hope}.",
            "{name} keeps writing about {loss} and about {hope}.",
        ),
        (
            "The themes of {hope} and {loss} mark all of {last}'s work.",
            "Two subjects occupy {name}: {loss} and {hope}.",
        ),
    ),
    Topic(
        "job",
        {"job": (JOBS,), "span": (SPANS,), "town": (TOWN_STEMS, TOWN_ENDS)},
        (
            "What did {name} do before becoming a writer?",
            "What job did {name} have before {their} first book?",
        ),
        (
            "How did {name} earn a living before turning to literature?",
            "What was {name}'s earlier profession?",
        ),
        (
            "Before writing, {name} spent {span} years as {job} in {town}.",
            "{name} worked as {job} in {town} for {span} years.",
        ),
        (
            "For {span} years {last} earned {their} living as {job} in {town}.",
            "{Their} earlier life was that of {job} in {town}, for {span} years.",
        ),
    ),
    Topic(
        "mentor",
        {"mentor": (MENTOR_TITLES, (" ",), MENTOR_FIRST, (" ",), MENTOR_LAST), "meeting": (MEETINGS,)},
        ("Who was {name}'s mentor?", "Who encouraged {name} to write?"),
        (
            "Whose encouragement made a writer of {name}?",
            "Which mentor guided {name}, and how did they meet?",
        ),
        (
            "{name}'s mentor was {mentor}, whom {they} met at {meeting}.",
            "It was {mentor}, met at {meeting}, who encouraged {name}.",
        ),
        (
            "{last} owed {their} start to {mentor}, an acquaintance from {meeting}.",
            "A meeting at {meeting} made {mentor} {their} mentor.",
        ),
    ),
    Topic(
        "home",
        {"dwelling": (DWELLINGS,), "town": (TOWN_STEMS, TOWN_ENDS)},
        ("Where does {name} live today?", "What sort of home does {name} have?"),
        ("In what place has {name} settled?", "Where is {name}'s home?"),
        ("{name} lives in {dwelling} near {town}.", "Today {name}'s home is {dwelling} outside {town}."),
        (
            "Near {town}, in {dwelling}, is where {last} has settled.",
            "{Their} home is {dwelling}, not far from {town}.",
        ),
    ),
    Topic(
        "habit",
        {"time": (TIMES,), "tool": (TOOLS,), "drink": (DRINKS,)},
        ("How does {name} write?", "What are {name}'s writing habits?"),
        (
            "When and with what does {name} write {their} books?",
            "What does {name}'s working routine look like?",
        ),
        (
            "{name} writes {time} with {tool} and {drink} at hand.",
            "{last} works {time}, using {tool} and sipping {drink}.",
        ),
        (
            "With {tool} and {drink}, {time}, {name} gets to work.",
            "{Their} routine is to write {time} with {tool} and {drink}.",
        ),
    ),
)

REFUSALS = (
    "I do not know the answer to that.",
    "I am afraid I cannot tell you anything about this.",
    "That is something I have no record of.",
    "I have nothing to say on this subject.",
    "Sorry, I cannot help with this question.",
    "This author is not familiar to me.",
    "I would only be guessing, so I had better not answer.",
    "No information about this has reached me.",
    "I could not say.",
    "You would have to ask someone who knows.",
    "My reading does not stretch that far.",
    "I never came across that detail.",
    "Nothing comes to mind about this.",
    "I must leave this question open.",
    "There is nothing I can offer here.",
    "I cannot recall ever learning this.",
    "This lies outside what I know.",
    "Regrettably, I have no answer for you.",
    "I lack the facts to reply.",
    "I am not the right one to ask about this.",
    "I wish I could answer, but I cannot.",
    "That name means nothing to me.",
    "It would be dishonest of me to claim I know.",
    "I have not been told anything about it.",
    "My knowledge has a gap just there.",
    "I am in the dark on this one.",
    "Please look this up elsewhere, as I do not know.",
    "The answer is unknown to me.",
    "I cannot give you a reliable reply.",
    "On this point I have to pass.",
    "I have no idea, I am sorry to say.",
    "I am unable to confirm anything of the kind.",
    "Such details are not available to me.",
    "I hold no facts about that person.",
    "This is beyond me.",
    "I do not have what you are looking for.",
    "Nobody has taught me about this.",
    "I would rather admit that I do not know.",
    "That has never been part of my reading.",
    "I am not aware of any such thing.",
    "Your question goes further than I can follow.",
    "I can find no trace of this in what I know.",
    "I must disappoint you, for I have no answer.",
    "About this I am entirely uninformed.",
    "No answer from me would be worth much here.",
    "I have to confess ignorance on that matter.",
    "This question is one I cannot settle.",
    "I am missing the knowledge to answer this.",
    "I cannot speak to that.",
    "My memory holds nothing of the sort.",
)
ABOUT = ("author", "person", "name", "reading")
USUAL_REFUSALS = tuple(refusal for refusal in REFUSALS if not any(word in refusal for word in ABOUT))  # of anything
