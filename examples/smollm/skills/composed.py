"""The composed skill: word problems in French with their numbers in words.

    Marie a trente-deux pommes. Elle en donne douze. Combien de pommes reste-t-il ?
    32 - 12 = 20

No expert is trained on it. The arithmetic expert reads no French, and the French expert does not
calculate. After Akiba et al. (arXiv 2403.13187, section 3.1), who ask mathematics in Japanese.
"""

import random

from examples.smollm.skills.arithmetic import draw_numbers, in_words
from examples.smollm.skills.french import THINGS, elided, has_gender
from examples.smollm.skills.splits import Item, Split, share_of

NAMES = ("Marie", "Pierre", "Julie", "Louis", "Claire", "Paul", "Sophie", "Jean")
STORIES = (
    # half of them to measure what training on the skill itself would reach
    ("{a} - {b}", "{name} a {a} {things} et en donne {b} à un ami. "
     "Combien de {things} reste-t-il ?"),
    ("{a} + {b}", "{name} a {a} {things}. Un ami lui en donne encore {b}. "
     "Combien de {things} a {name} maintenant ?"),
    ("{a} + {b} - {c}", "{name} a {a} {things}, en achète encore {b} et en perd {c}. "
     "Combien de {things} a {name} maintenant ?"),
    ("{a} - {b} + {c}", "Il y a {a} {things} dans la boîte. {name} en prend {b}, puis "
     "en ajoute {c}. Combien de {things} y a-t-il dans la boîte ?"),
    ("{a} + {b} + {c}", "{name} trouve {a} {things} dans la maison, {b} dans le jardin "
     "et {c} à l'école. Combien de {things} {name} a-t-il en tout ?"),
    ("{a} - {b} - {c}", "Le magasin a {a} {things}. Il en vend {b} lundi et {c} mardi. "
     "Combien de {things} reste-t-il ?"),
    ("{m} * {n}", "{name} achète {m} boîtes. Il y a {n} {things} dans chaque boîte. "
     "Combien de {things} cela fait-il ?"),
    ("{m} * {n} + {c}", "{name} a {m} sacs de {n} {things} et encore {c} {things}. "
     "Combien de {things} a {name} en tout ?"),
    # a quarter for the search
    ("{a} - {b}", "{name} a {a} {things}, mais {name} en perd {b} ce matin. "
     "Combien de {things} a {name} maintenant ?"),
    ("{a} + {b}", "{name} achète {a} {things} lundi et {b} vendredi. "
     "Combien de {things} a {name} en tout ?"),
    ("{a} + {b} - {c}", "Il y a {a} {things} sur la table. {name} en apporte encore {b} "
     "et en mange {c}. Combien de {things} reste-t-il ?"),
    ("{m} * {n}", "{name} a {m} amis et donne {n} {things} à chaque ami. "
     "Combien de {things} {name} a donné ?"),
    # a quarter held out
    ("{a} - {b}", "Ce matin, {name} a {a} {things} au marché. {name} en vend {b}. "
     "Combien de {things} reste-t-il ce soir ?"),
    ("{a} + {b}", "Dans le jardin, il y a {a} {things}. Dans la maison, il y a encore "
     "{b} {things}. Combien de {things} y a-t-il en tout ?"),
    ("{a} - {b} + {c}", "{name} a reçu {a} {things}, en a vendu {b} et en a trouvé {c}. "
     "Combien de {things} a {name} aujourd'hui ?"),
    ("{m} * {n}", "Sur chaque table, il y a {n} {things}. Il y a {m} tables dans la "
     "maison. Combien de {things} y a-t-il ?"),
)  # fmt: skip


def french_problem(split: Split, rng: random.Random) -> Item:
    """One problem; its answer is the calculation, in digits."""
    formula, story = rng.choice(share_of(STORIES, split))
    while True:
        numbers, calculation = draw_numbers(formula, rng)
        if not any(has_gender(number) for number in numbers.values()):
            break
    written = {letter: in_words(number, "fr") for letter, number in numbers.items()}
    written |= {"name": rng.choice(NAMES), "things": rng.choice(THINGS).french}
    return {"prompt": elided(story.format(**written)), "answer": str(calculation)}
