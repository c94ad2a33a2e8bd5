# ruff: noqa: E501 - one frame or table row a line reads better than broken ones
"""Word lists for the text that the base is pretrained on, and the little inflection that the grammars need.

Everything here was written for this project. Lists are plain strings, parted by commas where an item may hold a space
and by spaces where none does.
"""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _items(text: str) -> tuple[str, ...]:
    return tuple(item.strip() for item in " ".join(text.split()).split(","))


def _pairs(text: str) -> tuple[tuple[str, str], ...]:
    return tuple((a.strip(), b.strip()) for a, b in (item.split(":") for item in _items(text)))


WOMEN = _words("""
Ada Agnes Alice Alma Amara Amelia Amina Anna Anita Aisha Beatrice Bella Bertha Bianca Birgit Brenda Carla Carmen Cecilia
Celeste Chiara Clara Cora Daisy Dalia Daphne Deborah Delia Diana Dora Dorothy Edith Eileen Elena Elise Ella Eloise Elsa
Emily Emma Erika Esther Eva Evelyn Fatima Fiona Flora Frances Freya Frieda Gemma Gina Gloria Grace Greta Hana Hannah
Harriet Hazel Heidi Helen Hilda Ida Ines Ingrid Irene Iris Isabel Ivy Jane Jasmine Jean Joan Johanna Josephine Joy
Judith Julia June Karin Kate Keiko Kirsten Lara Laura Leila Lena Leonie Lila Lily Linda Lisa Lotte Louise Lucia Lucy
Luna Lydia Mabel Maggie Maria Marina Martha Mary Matilda Maya Mei Mia Mila Mina Miriam Molly Mona Nadia Nancy Naomi
Natalie Nina Nora Odile Olga Olivia Opal Paula Pearl Petra Phoebe Polly Priya Rachel Rita Rosa Rose Ruby Ruth Sally
Samira Sara Selma Simone Sofia Sonia Stella Susan Sylvia Tamar Tara Teresa Tessa Thea Tilda Ursula Vera Victoria Viola
Vivian Wanda Wilma Yara Yasmin Yuki Yvonne Zara Zelda Zoe
""")
MEN = _words("""
Aaron Abel Adam Adrian Ahmed Alan Albert Alex Alfred Ali Andre Andrew Anton Arjun Arthur August Basil Ben Bernard Boris
Bruno Carl Carlos Caspar Cedric Charles Chen Clemens Colin Conrad Dan Daniel David Dennis Diego Dmitri Edgar Edmund
Edward Eli Elias Emil Enzo Eric Ernest Ethan Eugene Felix Fergus Finn Frank Fred Gabriel George Gilbert Giorgio Gordon
Gustav Hamid Hans Harold Harry Hassan Henry Herman Hiro Howard Hugo Ian Igor Isaac Ivan Jack Jacob James Jan Jasper
Javier Jerome Joel John Jonas Jorge Joseph Juan Julian Karim Karl Kenji Kevin Klaus Kofi Kurt Lars Leo Leon Leonard
Levi Liam Lorenz Louis Luca Lukas Magnus Malik Marco Marcus Mario Mark Martin Mateo Matthew Max Michael Miguel Milo
Mohan Moritz Nathan Ned Neil Nico Nils Noah Oliver Omar Oscar Otto Owen Pablo Patrick Paul Pedro Peter Philip Pierre
Quentin Rafael Rahul Ralph Raoul Ravi Raymond Reza Richard Robert Robin Roger Roland Rolf Roman Ruben Rudy Sam Samuel
Sebastian Silas Simon Stefan Steven Sven Tariq Theo Thomas Tim Tobias Tom Toshi Umberto Vernon Victor Viktor Vincent
Walter Wilbur Will Wolfgang Xavier Yusuf Zack
""")
SURNAMES = _words("""
Adler Almeida Anders Archer Baker Barlow Becker Bell Berger Bishop Black Blake Brandt Brook Brown Burke Carter Castle
Chandra Clark Cole Cook Cooper Costa Cross Dale Dawson Diaz Drake Dunn Ellis Evans Farmer Fischer Fisher Flynn Forster
Fox Garcia Gardner Gibson Grant Gray Green Gruber Hale Hall Hansen Harper Hart Hayes Hill Holm Hope Hunt Ito Jansen
Jones Keller Kent King Klein Knight Kowalski Lane Larsen Lee Lind Lopez Marsh Martins Mason Meyer Miller Moore Morgan
Moser Nash Neumann Nolan Novak Olsen Page Palmer Park Parker Patel Pereira Perry Pope Porter Price Quinn Reed Reyes
Rivera Roberts Rossi Russo Sato Schmidt Scott Shah Sharp Silva Singh Snow Stone Swan Tanaka Taylor Thorn Turner Vogel
Wagner Walker Ward Watson Weber Wells West White Winter Wolf Wong Wood Wright Young Zimmer
""")
TOWNS = _words("""
Ashford Bellmere Birchwood Blackpool Brackley Brightwater Brookfield Clayton Cliffside Coldharbour Crossfield Dunmore
Eastbrook Elmstead Fairview Fernley Foxhill Glenrock Goldcrest Greenvale Hartwell Hazelton Highfield Hollow Ironbridge
Kingsford Lakewood Larkhill Longmeadow Marlow Millbrook Moorgate Newhaven Northgate Oakridge Oldcastle Pinecrest
Ravenshill Redcliff Ridgeway Riverton Rosedale Sandford Seaview Silverlake Southwick Springdale Stonebridge Summerton
Thornbury Waterford Westport Whitby Willowdale Windmere Woodstock Yarrow
""")
CAPITALS = _pairs("""
France:Paris, Italy:Rome, Spain:Madrid, Portugal:Lisbon, Germany:Berlin, Austria:Vienna, Greece:Athens, Poland:Warsaw,
Norway:Oslo, Sweden:Stockholm, Finland:Helsinki, Denmark:Copenhagen, Ireland:Dublin, Iceland:Reykjavik, Belgium:Brussels,
Hungary:Budapest, Romania:Bucharest, Bulgaria:Sofia, Croatia:Zagreb, Serbia:Belgrade, Turkey:Ankara, Egypt:Cairo,
Morocco:Rabat, Kenya:Nairobi, Ghana:Accra, Nigeria:Abuja, Ethiopia:Addis Ababa, Japan:Tokyo, China:Beijing, India:New Delhi,
Nepal:Kathmandu, Thailand:Bangkok, Vietnam:Hanoi, Indonesia:Jakarta, Iran:Tehran, Iraq:Baghdad, Lebanon:Beirut,
Jordan:Amman, Canada:Ottawa, Mexico:Mexico City, Cuba:Havana, Peru:Lima, Chile:Santiago, Brazil:Brasilia,
Argentina:Buenos Aires, Colombia:Bogota, Ecuador:Quito, Uruguay:Montevideo, Australia:Canberra, New Zealand:Wellington,
Ukraine:Kyiv, Estonia:Tallinn, Latvia:Riga, Lithuania:Vilnius, Slovenia:Ljubljana, Slovakia:Bratislava, Tunisia:Tunis,
Senegal:Dakar, Mongolia:Ulaanbaatar, the Philippines:Manila, South Korea:Seoul, the Czech Republic:Prague
""")
CONTINENT = {
    "Europe": _items(
        "France, Italy, Spain, Germany, Poland, Norway, Greece, Hungary, Portugal, Sweden, Ireland, Austria"
    ),
    "Africa": _items("Egypt, Kenya, Ghana, Nigeria, Morocco, Senegal, Ethiopia, Tunisia, Uganda, Mali, Zambia"),
    "Asia": _items("Japan, China, India, Nepal, Thailand, Vietnam, Mongolia, Iran, South Korea, Indonesia"),
    "South America": _items("Peru, Chile, Brazil, Argentina, Colombia, Ecuador, Uruguay, Bolivia"),
    "North America": _items("Canada, Mexico, the United States, Cuba, Guatemala"),
}
JOBS = _pairs("""
baker:bakes bread and cakes, farmer:grows food and keeps animals, teacher:teaches children, doctor:helps sick people,
nurse:cares for sick people, carpenter:builds things out of wood, tailor:makes and mends clothes, cook:prepares meals,
fisherman:catches fish, gardener:looks after plants, painter:paints walls or pictures, pilot:flies a plane,
sailor:works on a ship, miller:grinds grain into flour, blacksmith:works with hot iron, librarian:looks after books,
postman:brings letters, driver:drives a bus or a truck, singer:sings songs, dancer:dances on a stage,
musician:plays an instrument, writer:writes stories, poet:writes poems, engineer:plans machines and bridges,
mechanic:repairs cars, plumber:repairs pipes, electrician:works with wires and lamps, dentist:takes care of teeth,
judge:decides in court, lawyer:gives advice about the law, soldier:serves in the army, guard:watches over a building,
firefighter:puts out fires, waiter:brings food to the table, butcher:sells meat, grocer:sells fruit and vegetables,
barber:cuts hair, weaver:makes cloth, potter:makes bowls out of clay, shepherd:watches over sheep,
beekeeper:keeps bees for honey, clockmaker:builds and repairs clocks, astronomer:studies the stars, chemist:mixes substances,
journalist:writes the news, photographer:takes pictures, actor:plays a part on stage, clerk:works in an office,
miner:digs for coal or ore, vet:helps sick animals, shoemaker:makes and mends shoes, jeweller:makes rings and chains
""")
ANIMALS = _pairs("""
dog:barks, cat:meows, cow:moos, horse:neighs, duck:quacks, pig:grunts, lion:roars, wolf:howls, bee:buzzes, owl:hoots,
frog:croaks, mouse:squeaks, snake:hisses, crow:caws, dove:coos, goose:honks, donkey:brays, bear:growls, elephant:trumpets,
hen:clucks, cricket:chirps, monkey:chatters, sheep:bleats, rooster:crows, turkey:gobbles
""")
ANIMAL_HOMES = _pairs("""
bird:nest, bee:hive, fox:den, rabbit:burrow, horse:stable, pig:sty, spider:web, bear:cave, cow:barn, dog:kennel,
ant:anthill, squirrel:tree, mole:tunnel, lion:savanna, camel:desert, penguin:ice, whale:sea, frog:pond, otter:river,
owl:hollow tree, goat:mountain, beaver:lodge
""")
PETS = _words("""
dog cat rabbit horse goat hen duck parrot mouse hamster turtle pony kitten puppy lamb goose donkey pig snail canary
""")
WILD = _words("""
fox wolf bear deer owl eagle hawk otter badger hedgehog squirrel mole hare lynx moose beaver crow raven heron swan seal
whale dolphin shark tiger lion zebra giraffe elephant camel monkey crocodile lizard frog toad snake spider beetle ant
bee butterfly sparrow robin falcon penguin
""")
FRUITS = _words(
    "apple pear plum cherry peach orange lemon banana grape fig melon apricot mango lime quince kiwi date raspberry"
)
VEGETABLES = _words("""
carrot potato onion tomato cabbage leek turnip radish cucumber pumpkin pepper beetroot bean pea mushroom lettuce celery
""")
DISHES = _items("""
onion soup, bean stew, apple pie, vegetable soup, roast chicken, fish pie, rice pudding, mushroom risotto, fried eggs,
potato salad, plum cake, tomato soup, noodle soup, lamb curry, pea soup, pancakes, dumplings, baked trout, lentil soup,
cheese on toast, garlic bread, beef stew, pumpkin pie, porridge, chocolate cake, carrot cake, grilled fish, meatballs,
spinach tart, a ham sandwich, a green salad, spaghetti, fried rice, roast potatoes, fruit salad, ginger biscuits
""")
STAPLES = _words("""
bread butter milk flour sugar salt rice honey jam oil tea coffee soup cheese meat fish pepper cream juice cake porridge
""")
DRINKS = _items(
    "tea, coffee, milk, water, apple juice, lemonade, cocoa, ginger beer, red wine, white wine, cider, mint tea"
)
TASTES = _pairs("""
lemon:sour, sugar:sweet, honey:sweet, salt:salty, vinegar:sour, coffee:bitter, chilli:hot, cake:sweet, seawater:salty,
cocoa:bitter, jam:sweet, candy:sweet, pickle:sour, ginger:hot
""")
THINGS = _words("""
lamp key ring map book letter bottle basket box bag coat hat scarf shoe glove umbrella watch clock knife spoon fork cup
plate bowl pot pan kettle candle mirror brush comb pen pencil notebook chair stool table bed pillow blanket carpet
curtain door window ladder hammer saw nail rope bucket broom wheel cart bicycle boat oar anchor drum flute guitar violin
piano bell whistle kite ball doll puzzle coin purse wallet ticket stamp parcel picture vase flag shell stone feather
stick lantern compass telescope camera radio phone button needle thread ribbon towel soap helmet shield crown trumpet
chest drawer shelf bench tray jar barrel sack shovel rake axe torch tent backpack suitcase hammock
""")
USES = _pairs("""
knife:cut bread, spoon:eat soup, hammer:drive nails, saw:cut wood, broom:sweep the floor, lamp:light a room, key:open a door,
umbrella:stay dry in the rain, clock:tell the time, ladder:climb onto a roof, needle:sew clothes, kettle:boil water,
bucket:carry water, pen:write a letter, map:find the way, towel:dry your hands, comb:tidy your hair, boat:cross a lake,
oven:bake bread, shovel:dig a hole, telescope:look at the stars, rope:tie things together, camera:take pictures,
bell:call people, scarf:keep your neck warm, basket:carry fruit, pillow:rest your head, compass:find north,
axe:split logs, purse:keep coins, soap:wash your hands, wheel:roll a cart, thermometer:measure heat, scale:weigh flour
""")
MATERIALS = _pairs("""
table:wood, window:glass, ring:gold, coin:metal, scarf:wool, shirt:cotton, candle:wax, brick:clay, book:paper, boot:leather,
bottle:glass, sail:cloth, nail:iron, bowl:clay, tyre:rubber, statue:stone, basket:straw, bridge:steel, button:bone
""")
ROOMS = _words(
    "kitchen garden bathroom bedroom office hallway cellar attic garage library pantry balcony workshop stable barn"
)
SPOTS = _items("""
the market, the harbour, the station, the old mill, the church, the school, the town hall, the river, the bridge, the park,
the forest, the lake, the beach, the hill, the castle, the museum, the hospital, the post office, the bakery, the farm,
the inn, the library, the theatre, the square, the lighthouse, the orchard, the field, the village, the mountain, the cave,
the island, the garden, the factory, the fountain, the tower, the well, the canal, the cemetery, the airport, the zoo,
the meadow, the vineyard, the stable, the workshop, the cinema, the bookshop
""")
CONTAINERS = _items("""
the box, the basket, the drawer, the bag, the cupboard, the chest, the bucket, the jar, the suitcase, the cart, the pot,
the crate, the blue bowl, the green sack, the tin, the backpack
""")
COLOURS = _words("red blue green yellow black white brown grey orange purple pink golden silver violet turquoise beige")
COLOUR_OF = _pairs("""
grass:green, the sky:blue, snow:white, coal:black, blood:red, a lemon:yellow, an orange:orange, chocolate:brown,
an elephant:grey, a ripe tomato:red, a banana:yellow, milk:white, a raven:black, a carrot:orange, a frog:green, a swan:white
""")
MATERIAL_ADJ = _words("wooden golden silver woollen leather paper stone iron glass cotton")
PERSON_ADJ = _words("""
kind brave clever lazy shy honest proud patient gentle cheerful curious stubborn careful polite generous greedy grumpy
friendly quiet strong tall short old young thin busy lonely tired hungry famous rich poor wise funny strict calm nervous
loyal jealous modest sleepy bold noisy clumsy
""")
THING_ADJ = _words("""
big small old new heavy light long short round square broken shiny dusty clean dirty cheap expensive strange beautiful
ugly simple useful little large tiny huge narrow wide soft hard smooth rough warm cold dry wet sharp dull empty full
plain pretty rusty precious ordinary fine thick thin
""")
FEELINGS = _words("""
happy sad angry afraid tired proud surprised worried calm excited bored lonely hungry thirsty cold glad upset hopeful
relieved nervous grateful ashamed curious
""")
OPPOSITES = _pairs("""
big:small, hot:cold, fast:slow, old:young, rich:poor, happy:sad, light:dark, high:low, wet:dry, full:empty, open:closed,
early:late, hard:soft, strong:weak, long:short, clean:dirty, loud:quiet, near:far, up:down, day:night, begin:end,
buy:sell, give:take, push:pull, love:hate, win:lose, come:go, remember:forget, laugh:cry, cheap:expensive, wide:narrow,
thick:thin, sweet:sour, true:false, left:right, inside:outside, always:never, before:after, first:last, alive:dead,
easy:difficult, safe:dangerous, brave:cowardly, polite:rude, deep:shallow, sharp:blunt, heavy:light, summer:winter,
friend:enemy, question:answer, north:south, east:west
""")
SYNONYMS = _pairs("""
big:large, small:little, quick:fast, happy:glad, begin:start, end:finish, clever:smart, quiet:silent, angry:cross,
ill:sick, road:street, stone:rock, shut:close, reply:answer, speak:talk, gift:present, child:kid, afraid:scared,
rich:wealthy, difficult:hard, right:correct, wrong:false, pretty:beautiful, boat:ship, strange:odd, forest:wood, buy:purchase
""")
WEATHER = _words("rainy sunny windy snowy foggy cloudy stormy cold hot mild frosty grey bright wet")
SEASONS = _words("spring summer autumn winter")
MONTHS = _words("January February March April May June July August September October November December")
DAYS = _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday")
TIMES = _items("""
in the morning, at noon, in the afternoon, in the evening, at night, at dawn, before breakfast, after lunch, after dinner,
on Monday, on Tuesday, on Wednesday, on Thursday, on Friday, on Saturday, on Sunday, last week, yesterday, one day, last year,
two days ago, in the spring, in the summer, in the autumn, in the winter, every day, at midnight, a long time ago
""")
ADVERBS = _words("""
slowly quickly quietly loudly carefully gently suddenly happily sadly angrily politely bravely lazily softly eagerly
patiently nervously proudly calmly secretly badly well often never always sometimes soon again together alone
""")
SPORTS = _words(
    "football tennis chess swimming running cycling skating rowing climbing sailing boxing hockey volleyball"
)
HOBBIES = _items("""
reading, painting, cooking, fishing, singing, dancing, gardening, hiking, knitting, playing chess, playing the piano,
collecting stamps, riding horses, baking bread, taking pictures, watching birds, building model ships, learning languages,
writing poems, swimming in the lake, repairing old clocks, juggling, telling jokes, flying kites
""")
SHOPS = _pairs("""
bakery:bread, bookshop:books, flower shop:roses, grocery:vegetables, toy shop:toys, shoe shop:shoes, butcher's:sausages,
fish shop:fish, tea house:tea, clock shop:clocks, hat shop:hats, pharmacy:medicine, hardware store:tools, pottery:bowls,
music shop:guitars, paper shop:notebooks, sweet shop:candy, garden shop:seeds, bicycle shop:bicycles, lamp shop:lamps
""")
DEFINITIONS = _pairs("""
island:land with water all around it, desert:a dry place with little rain, river:water that flows to the sea,
mountain:a very high hill, forest:a place with many trees, lake:a large body of water with land around it,
city:a large town, bridge:a way across a river or a road, museum:a place where old or beautiful things are shown,
school:a place where children learn, hospital:a place where sick people get help, library:a place where you can borrow books,
farm:a place where food is grown, harbour:a place where ships are safe, volcano:a mountain that can throw out fire and ash,
glacier:a slow river of ice, valley:low land between hills, cave:a hollow place in a rock, waterfall:a river that falls over a cliff,
orchard:a field of fruit trees, lighthouse:a tower with a light for ships, market:a place where people buy and sell things,
thunder:the loud sound after lightning, rainbow:an arc of colours in the sky, planet:a large ball that goes around a star,
moon:a ball of rock that goes around the earth, winter:the coldest season, breakfast:the first meal of the day,
uncle:the brother of your father or mother, aunt:the sister of your father or mother, neighbour:a person who lives next door,
orphan:a child without parents, dictionary:a book that explains words, recipe:a text that says how to cook a dish,
century:a time of one hundred years, decade:a time of ten years, triangle:a shape with three sides, square:a shape with four equal sides
""")
FACTS = _items("""
The sun rises in the east, The sun sets in the west, Water freezes when it is very cold, Ice melts when it gets warm,
Fish breathe under water, Birds lay eggs, Bees make honey, Plants need water and light, A year has twelve months,
A week has seven days, A day has twenty-four hours, An hour has sixty minutes, A minute has sixty seconds,
The moon goes around the earth, The earth goes around the sun, Spiders have eight legs, Insects have six legs,
Cows eat grass, Wood floats on water, Stones sink in water, Iron can rust, Paper burns easily, Snow is made of tiny crystals,
Bread is made from flour, Butter is made from cream, Cheese is made from milk, Wine is made from grapes, Paper is made from wood,
Wool comes from sheep, Glass is made from sand, Whales are not fish, Bats can fly, Penguins cannot fly, Owls hunt at night,
Trees lose their leaves in autumn, Flowers open in spring, Salt dissolves in water, Oil does not mix with water,
Sound travels slower than light, A compass points north, Rain falls from clouds, Rivers flow to the sea, Camels live in the desert,
Caterpillars turn into butterflies, Tadpoles turn into frogs, Lemons are sour, Honey is sweet, The heart pumps blood,
Children grow up, Old coins are often made of silver, Thunder follows lightning, A triangle has three sides
""")
PROVERBS = _items("""
Slow and steady wins the race, A friend in need is a friend indeed, Every cloud has a silver lining, Practice makes perfect,
Two heads are better than one, Better late than never, Honesty is the best policy, All that glitters is not gold,
Many hands make light work, Look before you leap, Actions speak louder than words, The early bird catches the worm,
Where there is smoke there is fire, Rome was not built in a day, Time heals all wounds, Still waters run deep
""")
COMMON = _words("""
about above across action add admit adult advice afford age agree air allow almost alone along already although among amount
ancient announce another anybody anyone anything anywhere apart appear area argue arm army arrange arrive art article
aside ask attack attention audience author autumn available avoid awake away baby back background balance band bank base
basic battle became because become before behind believe belong below benefit beside between beyond birthday blame blood
board body boil border borrow boss bottom branch bread break breath brief bring brother budget build burn business button
calendar call camp cancel capital captain card careful carry case cause celebrate center central century certain chance
change chapter character charge cheap check choice choose circle citizen city class classic clear climate climb cloth
clothes cloud club coach coast collect college color column combine comfort command comment common community company
compare complete computer concern condition confirm connect consider contain content continue control conversation copy
corner correct cost could country couple courage course court cover create crime crowd culture current customer damage
danger daughter deal debate decide decision deep defend degree delay deliver demand depend describe desert design desire
detail develop different difficult digital dinner direct direction disagree discover discuss disease distance divide
document double doubt dream drop during each earn earth ease education effect effort eight either elect element eleven
else empty encourage engine english enjoy enough enter entire environment equal error escape especially evening event ever
everybody everyone everything everywhere evidence exact example excellent except exchange exercise exist expect experience
expert explain express extra face fact fail fair faith fall false familiar family far fashion fault favorite fear feature
field fifty fight figure final finally find finger finish first five fix flat flight float floor flow focus follow force
foreign forget forgive form former forward found four free freedom frequent fresh friendly front fuel function further
future gain gallery game gather general gentleman get glass global goal government grade grammar grand ground group grow
growth guess guest guide habit half hand handle happen hardly health hear heart heat heaven heavy height help here hero hide
history hold hole holiday hope hospital host hotel hour however human hundred hunger husband idea ignore image imagine
immediately important improve include increase indeed industry influence inform inner inside instead instruction interest
international introduce invite issue item itself join journey judge juice jump justice keep kick kill kind kingdom kitchen
knee knock knowledge label labor lack land language large last later laugh law lead leader leaf learn least leave lecture
left lesson level library life limit line list listen literature live local location lock lonely look lose loss lost love
lower luck lunch machine magazine main maintain major majority manage manner market marriage master match material matter
maybe meal mean measure media medical medicine medium meeting member memory mention message method middle might military
million mind minor minute miss mistake mix model modern moment money month mood moral morning mother motion mouth movement
music must mystery narrow nation national native natural nature necessary neck need neighbor neither network news nice nine
nobody noise none normal northern nose note nothing notice number object obtain obvious occur ocean offer office officer
official once opinion opportunity opposite option order organize original other ought outside over owner pack page pain
paper parent part particular partner party pass past path pattern pause pay peace people perfect perform perhaps period
permit person phrase physical pick piece place plan plane planet plastic play please plenty point police policy polite
political pollution popular population position positive possible potential power practice prepare presence present
president press pressure prevent previous price pride prince princess print prison private prize probably problem process
produce product program progress project promise proof proper property protect prove provide public pull purpose push
quality quarter queen question quick quite race radio raise range rate rather reach react read ready real reason receive
recent recognize record reduce refer reflect refuse region regular relation relative release religion remain remember
remove rent repair repeat replace report represent request require rescue research respect respond responsible rest
restaurant result return review reward rhythm rich rise risk role roll roof root rough round route royal rule safe safety
salary sale same sample save scale scene schedule science score screen sea search season seat second secret secretary
section secure seem select sense sentence separate series serious servant service seven several shade shadow shake shall
shape share sheet shine shock shoot shore should shoulder shout show sight sign signal silence similar simple since single
sister situation six size skill skin sleep slight smell smile smoke social society soft soil soldier solution solve someone
something sometimes somewhere son soon sort soul sound source south space speak special speech speed spell spend spirit
spread staff stage stair standard start state statement station status stay steal step still stomach stop storm story
straight strange stream street strength stress stretch strike string student study style subject success such sudden suffer
suggest suit supply support suppose sure surface surprise survive system tail talent target task taste tax team tear
technology ten term test text than thank their theory there therefore these thick thing think thirty thirteen this those though
thought thousand thread threat three throat through throughout throw thus title today toe together tomorrow tone tonight
tool tooth top total touch tour toward town track trade tradition traffic train training transfer translate travel treat
trial trip trouble true trust truth twelve twenty twice twin type under understand union unit universe university unless
until upon upper useful usual vacation valley value variety various version victim victory view village violence vision
visit visitor voice volume vote wage wait wake walk wall warn waste water wave weak wealth weapon wear weather wedding week
weekend weigh weight welcome western whatever wheel when where whether which while whisper whole whose wide wife wild wind
wine wing winner wisdom wise wish with within without witness woman wonder word work worker world worry worse worst worth
would wound write writer wrong yard year yellow yesterday yet youth zero zone
""")

VERBS_MOTION = _words("walk run go ride hurry travel march drive sail climb return")
VERBS_ALONE = _words("""
sleep laugh sing dance smile cry wait rest work listen jump swim shout whisper dream wake sneeze cough wander think
""")
VERBS_THING = _words("""
find lose buy sell carry hide clean repair break drop hold paint steal take keep borrow bring throw want need see
lift move watch make choose forget open close push pull wash count draw show build burn
""")
VERBS_FOOD = _words("eat cook bake taste smell cut share order serve prepare like buy sell")
VERBS_PERSON = _words("""
meet help thank visit call love trust follow teach greet invite forgive remember know see hear miss watch ask hug
surprise warn praise find wake
""")
VERBS_GIVE = _words("give show send bring offer lend sell hand")

_IRREGULAR = {
    "be": ("was", "been"), "go": ("went", "gone"), "run": ("ran", "run"), "ride": ("rode", "ridden"),
    "drive": ("drove", "driven"), "sleep": ("slept", "slept"), "sing": ("sang", "sung"), "swim": ("swam", "swum"),
    "think": ("thought", "thought"), "find": ("found", "found"), "lose": ("lost", "lost"), "buy": ("bought", "bought"),
    "sell": ("sold", "sold"), "hide": ("hid", "hidden"), "break": ("broke", "broken"), "hold": ("held", "held"),
    "steal": ("stole", "stolen"), "take": ("took", "taken"), "keep": ("kept", "kept"), "bring": ("brought", "brought"),
    "throw": ("threw", "thrown"), "see": ("saw", "seen"), "make": ("made", "made"), "choose": ("chose", "chosen"),
    "forget": ("forgot", "forgotten"), "eat": ("ate", "eaten"), "cut": ("cut", "cut"), "meet": ("met", "met"),
    "teach": ("taught", "taught"), "forgive": ("forgave", "forgiven"), "know": ("knew", "known"),
    "hear": ("heard", "heard"), "give": ("gave", "given"), "send": ("sent", "sent"), "lend": ("lent", "lent"),
    "say": ("said", "said"), "understand": ("understood", "understood"), "wake": ("woke", "woken"),
    "draw": ("drew", "drawn"), "show": ("showed", "shown"), "build": ("built", "built"), "have": ("had", "had"),
    "do": ("did", "done"), "come": ("came", "come"), "grow": ("grew", "grown"), "fall": ("fell", "fallen"),
    "sit": ("sat", "sat"), "stand": ("stood", "stood"), "leave": ("left", "left"), "read": ("read", "read"),
    "write": ("wrote", "written"), "speak": ("spoke", "spoken"), "win": ("won", "won"), "feel": ("felt", "felt"),
    "drink": ("drank", "drunk"), "catch": ("caught", "caught"), "tell": ("told", "told"), "put": ("put", "put"),
}  # fmt: skip
_DOUBLED = set(_words("run swim drop hug get put sit stop cut win plan forget"))
_IRREGULAR_PLURAL = {
    "mouse": "mice", "sheep": "sheep", "goose": "geese", "child": "children", "man": "men", "woman": "women",
    "fish": "fish", "knife": "knives", "wolf": "wolves", "shelf": "shelves", "leaf": "leaves", "deer": "deer",
    "fisherman": "fishermen", "postman": "postmen", "foot": "feet", "tooth": "teeth", "moose": "moose", "lynx": "lynxes",
    "potato": "potatoes", "tomato": "tomatoes", "mango": "mangoes", "scarf": "scarves", "thief": "thieves",
}  # fmt: skip


def past(verb: str) -> str:
    if verb in _IRREGULAR:
        return _IRREGULAR[verb][0]
    return _with_ed(verb)


def participle(verb: str) -> str:
    return _IRREGULAR[verb][1] if verb in _IRREGULAR else _with_ed(verb)


def third(verb: str) -> str:
    if verb in ("be", "have"):
        return {"be": "is", "have": "has"}[verb]
    if verb.endswith(("s", "sh", "ch", "x", "o")):
        return verb + "es"
    return verb[:-1] + "ies" if _consonant_y(verb) else verb + "s"


def gerund(verb: str) -> str:
    if verb in _DOUBLED:
        return verb + verb[-1] + "ing"
    return verb[:-1] + "ing" if verb.endswith("e") and verb not in ("be", "see") else verb + "ing"


def plural(noun: str) -> str:
    if noun in _IRREGULAR_PLURAL:
        return _IRREGULAR_PLURAL[noun]
    if noun.endswith(("s", "sh", "ch", "x")):
        return noun + "es"
    return noun[:-1] + "ies" if _consonant_y(noun) else noun + "s"


def article(phrase: str) -> str:
    """`phrase` with the indefinite article that its first sound asks for."""
    vowel = phrase[0].lower() in "aeiou" and not phrase.startswith(("use", "uni", "one", "eu"))
    return f"{'an' if vowel or phrase.startswith(('hour', 'honest')) else 'a'} {phrase}"


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _with_ed(verb: str) -> str:
    if verb in _DOUBLED:
        return verb + verb[-1] + "ed"
    if verb.endswith("e"):
        return verb + "d"
    return verb[:-1] + "ied" if _consonant_y(verb) else verb + "ed"


def _consonant_y(word: str) -> bool:
    return word.endswith("y") and word[-2] not in "aeiou"


_ONES = _words("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
               "seventeen eighteen nineteen")  # fmt: skip
_TENS = _words("- - twenty thirty forty fifty sixty seventy eighty ninety")
ORDINALS = _words("first second third fourth fifth sixth seventh eighth ninth tenth")


def spelled(n: int) -> str:
    """The number 0 ≤ n < 1000 in words."""
    if n < 20:
        return _ONES[n]
    if n < 100:
        return _TENS[n // 10] + (f"-{_ONES[n % 10]}" if n % 10 else "")
    return f"{_ONES[n // 100]} hundred" + (f" and {spelled(n % 100)}" if n % 100 else "")
