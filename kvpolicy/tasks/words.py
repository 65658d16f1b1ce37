"""English words of our own choice, and words made of them."""

from __future__ import annotations

import random
import string
from itertools import product

_ADJECTIVES = """
able amber ancient arctic ashen autumn bald bitter blank blue bold brave brief bright brisk broad bronze brown busy
calm careful cheap cheerful chief civil clean clear clever close cloudy coarse cold common cool coral cosmic crimson
crisp curly curved dark dear deep dense distant double dry dull dusty eager early earnest east easy elder empty equal
even exact faint fair famous fancy fast final fine firm first flat fluent fond formal fresh frosty frozen full gentle
giant glad global golden good grand grateful gray green handy happy harsh heavy hidden high hollow honest humble icy
idle ivory jolly just keen kind large late lazy lean level light little lively local lofty lone long loud loyal lucky
lunar main major mellow merry mild minor misty modern modest muddy narrow neat new nimble noble north novel odd olive
open orange outer pale patient plain pleasant polar polite proud pure purple quick quiet rapid rare raw ready recent
red rich rigid ripe robust rough round royal rural rusty safe salty sandy scarlet secret serene sharp short shy silent
silver simple sleepy slender slim slow small smart smooth snowy sober soft solar solid south spare special spicy
square stable stark steady steep stern stiff still stout strict strong sturdy subtle sudden sunny sure sweet swift
tall tame tender thick thin tidy tiny tough tranquil true upper urban vague vast velvet vital vivid warm weak west wet
white whole wide wild windy wise wooden yellow young
"""
_NOUNS = """
acorn actor anchor angle ankle apple apron arch arrow artist atlas attic autumn axle badge bakery ball bamboo band
bank banner barn barrel basket beach beacon bean bear beaver bell belt bench berry bird blanket block blossom board
boat bonnet book boot border bottle boulder bowl box branch bread brick bridge broom brush bucket buckle bulb bundle
butter button cabin cable cactus camel camera canal candle canoe canvas cape captain carbon carpet carrot cart castle
cattle cave cedar cellar chain chair chalk channel chapel chart cheese cherry chest chimney circle citizen city cliff
clock cloud clover coach coal coast coat cobweb coffee coin collar comet compass copper cork corner cotton couch
country cousin crab cradle crane crater creek crown crystal cup curtain cushion dairy daisy dance deer desert desk
diamond dinner doctor dollar dolphin donkey door dragon drawer dream dress drum duck eagle earth easel echo editor
elbow elm ember empire engine engineer envelope evening fabric factory falcon farm farmer feather fence fern ferry
fiddle field fig finger fish flag flame flask fleet flock floor flour flower flute foam forest fork fossil fountain
fox frame friend frog frost fruit funnel garden garlic gate giraffe glacier glass globe glove goat goose grain granite
grape grass gravel guitar hammer hammock harbor harp hat hawk hazel heart hedge helmet herb heron hill hive honey hood
hook horn horse hotel hour house hunter ice igloo iron island ivy jacket jar jelly jewel journal judge juice jungle
kettle key kite kitchen kitten knee knife knot ladder lake lamp lantern lark lawn leaf leather lemon letter library
lily lime lion lizard lock locust lodge lumber magnet mango map maple marble market marsh mask mast meadow melon metal
meteor mill mint mirror mitten monkey month moon morning moss moth motor mountain mouse museum music mustard napkin
neck needle nest net nickel night nurse oak oar oasis oat ocean office onion orbit orchard orchid organ otter oven owl
oyster paddle page paint palace palm panda panel paper parade parcel park parrot partner pasture path peach peanut
pear pearl pebble pencil penguin pepper piano picnic picture pigeon pillow pilot pine pipe pirate planet plant plate
plow plum pocket poem pond pony poplar porch port potato prairie prince pump puppet quarry quartz queen quilt rabbit
radio radish raft rail rain raven reef ribbon rice ring river road robin rock rocket roof room root rope rose rudder
saddle sail sailor salad salmon salt sand scarf school scout season seed shadow sheep shelf shell ship shirt shoe
shore shovel signal silk singer skate sketch sky sled sleeve smoke snail snow soap sock soil song soup spark sparrow
spider spoon spring spruce squash stable stair stamp star station statue steam stone storm stove straw stream street
string student sugar summer sunset swamp swan table tailor tape teacher temple tent thimble thread throat throne
thunder ticket tiger timber toast tool torch tower town trail train tray treasure tree trumpet trunk tulip tunnel
turkey turtle umbrella uncle valley vase vessel village vine violet violin voyage wagon wall walnut water wave wheat
wheel whistle willow window wing winter wolf wood wool writer yard yarn zebra
"""
ADJECTIVES, NOUNS = _ADJECTIVES.split(), _NOUNS.split()
WORDS = sorted({*ADJECTIVES, *NOUNS})


def compound(draw: random.Random) -> str:
    """An adjective and a noun, such as "amber-lantern"."""
    return f"{draw.choice(ADJECTIVES)}-{draw.choice(NOUNS)}"


def different_words(count: int, draw: random.Random) -> list[str]:
    """`count` different words in any order: single ones, and compounds among them where there are not enough."""
    if count <= len(WORDS):
        return draw.sample(WORDS, count)
    compounds = [f"{first}-{second}" for first, second in product(ADJECTIVES, NOUNS)]
    return draw.sample([*WORDS, *compounds], count)


def letters(count: int, draw: random.Random) -> str:
    """A made-up word of lower-case letters."""
    return "".join(draw.choices(string.ascii_lowercase, k=count))
