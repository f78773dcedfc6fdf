"""Words of the small world: what problems, conversations and tasks are about, and a lexicon in three languages."""

import tomllib
from pathlib import Path
from typing import Any

TASK_WORDS = "sun tree fish bird stone river house bread milk door road rain star moon leaf hand book chair".split()
TASK_NAMES = "Ann Bob Eva Tom Mia Leo Zoe Max Lea Jan Ida Sam".split()
TASK_RELATIONS = [
    ("taller", "tallest", "shortest"),
    ("older", "oldest", "youngest"),
    ("faster", "fastest", "slowest"),
]
LANGUAGES = ("English", "French", "Spanish")
LEXICON = """
sun soleil sol, tree arbre árbol, fish poisson pez, bird oiseau pájaro, stone pierre piedra, house maison casa,
bread pain pan, milk lait leche, door porte puerta, road route camino, rain pluie lluvia, star étoile estrella,
moon lune luna, leaf feuille hoja, hand main mano, book livre libro, chair chaise silla, water eau agua,
fire feu fuego, king roi rey, dog chien perro, cat chat gato, horse cheval caballo, red rouge rojo, green vert verde,
white blanc blanco, black noir negro, one un uno, two deux dos, three trois tres, four quatre cuatro,
five cinq cinco, day jour día, night nuit noche, year année año"""
LEXICON = tuple(tuple(entry.split()) for entry in LEXICON.split(","))
_FILE = Path(__file__).with_name("wordings.toml")
_WORDINGS: dict[str, Any] = tomllib.loads(_FILE.read_text(encoding="utf-8"))
FAMILY_WORDINGS: dict[str, list[str]] = _WORDINGS["pretraining"]
TASK_WORDINGS: dict[str, dict[str, list[str]]] = _WORDINGS["tasks"]  # shown, asked, unseen
ORDERS: dict[str, dict[str, list[str]]] = _WORDINGS["orders"]  # the same, by language
