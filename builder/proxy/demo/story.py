"""Short stories for children, and for each the ending to find among those of other stories."""

from __future__ import annotations

import random
from collections.abc import Sequence

from builder.proxy.demo import draw
from builder.proxy.items import Item

# An opening and its ending; few endings name the hero, so that a name alone seldom gives the ending away.
STORIES: tuple[tuple[str, str], ...] = (
    (
        (
            "Once upon a time there was a small fox named Fip. Fip had a red scarf, but one windy day it blew up into "
            "a tall tree. A kind crow saw the fox crying below."
        ),
        "The crow picked the red scarf from the branch and dropped it softly around the fox's neck.",
    ),
    (
        (
            "Once upon a time there was a little boy named Arlo who loved kites. His blue kite got a big hole in it. "
            "His grandpa found some tape and a piece of old cloth."
        ),
        "Together they patched the hole, and soon the blue kite was flying high again.",
    ),
    (
        (
            "One day, a young mouse called Pippa found a huge piece of cheese behind the stove. She wanted to take it "
            "home, but it was too heavy to pull."
        ),
        "So she called her six brothers, and they rolled the cheese home together and had a feast.",
    ),
    (
        (
            "There was once a slow turtle named Oswin who wanted to see the sea. All the other animals laughed and "
            "said it was too far. Oswin walked a little every day and never gave up."
        ),
        "After many days he felt warm sand under his feet and saw the big blue waves at last.",
    ),
    (
        (
            "Once there was a girl named Tilda who was afraid of the dark. One night her mom gave her a tiny lamp "
            "shaped like a moon."
        ),
        "Tilda put the moon lamp beside her bed and slept without any fear.",
    ),
    (
        (
            "Once upon a time there was a baby bird called Kiki. Kiki sat in her nest and was scared to fly. Her "
            "mother flew to the next branch and sang to her."
        ),
        "The little bird spread her wings, jumped, and landed right beside her mother.",
    ),
    (
        (
            "One day, a farmer named Hobb planted a tiny pumpkin seed. He watered it every morning and talked to it. "
            "The pumpkin grew and grew until it was bigger than his cart."
        ),
        "The whole village came with spoons, and there was pumpkin soup for everyone.",
    ),
    (
        (
            "Once there was a snowman named Bolo who stood in a garden. The sun began to shine and he felt very soft. "
            "The children did not want him to melt."
        ),
        "The children built a roof of branches to keep their snowman cool in the shade.",
    ),
    (
        (
            "Once upon a time there was a green frog named Jub. Jub loved to sing at night, but his loud song kept the"
            " ducks awake. The ducks asked him to stop."
        ),
        "Jub said sorry to the ducks and promised to sing only in the morning.",
    ),
    (
        (
            "There was once a little train called Rusty. Rusty had to carry toys over a steep hill, but his wheels "
            "kept slipping. A big engine came from behind to help."
        ),
        "With a strong push the big engine helped him over the hill, and all the toys came on time.",
    ),
    (
        (
            "One day, a girl named Wren found a kitten in the rain. The kitten was wet and cold and said meow. Wren "
            "ran home with the kitten inside her coat."
        ),
        "Her dad dried the kitten with a towel and gave it a bowl of warm milk.",
    ),
    (
        (
            "Once upon a time there was a bear named Grumbo who loved honey. He put his paw into a hive without "
            "asking. The bees came out and were very angry."
        ),
        "The bear told the bees he was sorry, and next time he asked nicely for some honey.",
    ),
    (
        (
            "Once there was a boy named Teo who built a tall tower of blocks. His baby sister crawled past and knocked"
            " it down. Teo felt angry and wanted to shout."
        ),
        "Then he took a deep breath and let his baby sister help him build a new tower.",
    ),
    (
        (
            "One day, a rabbit called Clover lost a tooth while eating a carrot. She put the tooth under her pillow "
            "and went to sleep."
        ),
        "In the morning the tooth was gone, and there was a shiny coin under her pillow.",
    ),
    (
        (
            "There was once an old clock named Tock that lived in a kitchen. One morning Tock stopped ticking, and "
            "everyone in the house was late. A girl climbed up with a small key."
        ),
        "She turned the key three times, and the old clock began to tick again.",
    ),
    (
        (
            "Once upon a time there was a tiny ant named Milo. Milo found a crumb of cake and wanted to share it. On "
            "the way he met a hungry ladybug."
        ),
        "Milo broke the crumb in two, and he and the ladybug ate it under a leaf.",
    ),
    (
        (
            "One day, a pirate girl called Saba found a map in a bottle. The map showed a big cross on a small island."
            " She took a shovel and rowed there with her parrot."
        ),
        "They dug under the palm tree and found a chest full of golden coins.",
    ),
    (
        (
            "Once there was a puppy named Biscuit who chewed everything. One day he chewed Dad's new shoes. Dad was "
            "upset and Biscuit hid under the table."
        ),
        "Dad gave him a rubber bone to chew instead, and the shoes were safe.",
    ),
    (
        (
            "Once upon a time there was a princess named Odette who did not like her crown. It was heavy and hurt her "
            "head. She asked the gardener for help."
        ),
        "The gardener made her a light crown of daisies, and she wore it every day.",
    ),
    (
        (
            "There was once a cloud called Puff who was full of rain. All the flowers below were thirsty and dry. Puff"
            " did not want to get smaller."
        ),
        "At last the kind cloud let the rain fall, and every flower lifted its head.",
    ),
    (
        (
            "One day, a boy named Kofi went fishing with his uncle. He felt a strong pull on his line. It was not a "
            "fish at all, it was an old boot."
        ),
        "They laughed and laughed, and his uncle put a plant inside the old boot.",
    ),
    (
        (
            "Once there was a little elephant named Moko who had a very loud sneeze. When Moko sneezed, all the leaves"
            " fell from the trees. The monkeys had no place to hide."
        ),
        "One hot day the sneeze blew out a fire, and the monkeys cheered for Moko.",
    ),
    (
        (
            "Once upon a time there was a baker called Nella. She made a gingerbread man, and it jumped off the tray "
            "and ran out of the door. Nella ran after it down the street."
        ),
        "The gingerbread man got tired, so he came back to the warm bakery to rest.",
    ),
    (
        (
            "One day, a girl named Imani planted a sunflower next to her grandma's window. Grandma was sick and could "
            "not go outside. The flower grew taller every day."
        ),
        "One morning Grandma looked out and smiled, because a big yellow flower was looking in.",
    ),
    (
        (
            "There was once a penguin named Waddle who could not slide on the ice like his friends. He always rolled "
            "over and bumped his nose. His sister told him to lie flat on his belly."
        ),
        "He lay on his belly, pushed with his feet, and slid faster than all the others.",
    ),
    (
        (
            "Once upon a time there was a little robot called Zip. Zip could clean and cook, but he did not know how "
            "to laugh. A boy told him a joke about a banana."
        ),
        "The robot made a funny beeping sound, and the boy knew it was his very first laugh.",
    ),
    (
        (
            "Once there was a spider named Dotty who made webs in the barn. The cow walked through her web every "
            "morning and broke it. Dotty was tired of starting again."
        ),
        "The cow said sorry and showed Dotty a quiet corner near the window for her web.",
    ),
    (
        (
            "One day, a boy named Rafe took his toy boat to the river. The water was fast, and the boat floated away "
            "from him. A beaver was watching from the bank."
        ),
        "The beaver swam after the toy boat and pushed it back to the boy.",
    ),
    (
        (
            "Once upon a time there was a queen bee called Zizi. Winter was coming and there was no more room for "
            "honey. The bees asked an old oak tree for help."
        ),
        "The oak tree let them use the hole in its trunk, and they filled it with honey.",
    ),
    (
        (
            "There was once a young dragon named Ember who could not make fire. When he tried, only bubbles came out "
            "of his mouth. The children in the town saw the bubbles."
        ),
        "They clapped and jumped to catch the bubbles, and the dragon was proud of himself.",
    ),
    (
        (
            "One day, a girl called Juno lost her mother in a big market. She remembered to stay in one place and not "
            "to cry. A kind lady who sold oranges saw her."
        ),
        "The orange lady waited with her until her mother came running and hugged her.",
    ),
    (
        (
            "Once there was a horse named Thunder who was scared of water. The farm had a small stream, and the best "
            "grass was on the other side. A duck said the water was not deep."
        ),
        "Step by step the horse followed the duck through the stream and ate the sweet grass.",
    ),
    (
        (
            "Once upon a time there was a tailor named Benno who made coats. One cold night a poor man knocked at his "
            "door without a coat. Benno had only one piece of cloth left."
        ),
        "He sewed all night, and in the morning the poor man had a warm new coat.",
    ),
    (
        (
            "One day, two sisters named Ada and Bea both wanted the same swing. They pulled and pushed, and nobody was"
            " having fun. Then they saw a long board and a log."
        ),
        "They made a seesaw from the board and the log, and now both could play together.",
    ),
    (
        (
            "There was once a little star called Glim who fell out of the sky. Glim landed in a pond and could not get"
            " up. An owl with big wings heard the splash."
        ),
        "The owl carried the star on her back, higher and higher, until it shone in the sky again.",
    ),
    (
        (
            "Once upon a time there was a goat named Chester who ate everything. One day he ate the farmer's hat. The "
            "farmer had to work in the hot sun with no hat."
        ),
        "The goat felt bad and brought the farmer a big leaf to wear on his head.",
    ),
    (
        (
            "Once there was a girl named Lotte who wanted to ride a bike. She fell down two times and hurt her knee. "
            "Her brother held the seat and ran beside her."
        ),
        "Then her brother let go, and she rode all the way to the end of the street alone.",
    ),
    (
        (
            "One day, a squirrel named Nutkin hid his acorns in the ground. When winter came he could not remember "
            "where they were. He dug and dug and found nothing."
        ),
        "In the spring tiny oak trees came up, and the squirrel knew where his acorns had been.",
    ),
    (
        (
            "Once upon a time there was a boy called Finn who lived in a lighthouse. One stormy night the big lamp "
            "went out. A ship was coming close to the rocks."
        ),
        "The boy waved a lantern from the top, and the ship turned away from the rocks.",
    ),
    (
        (
            "There was once a sheep named Woolly who had too much wool. It was summer and she was so hot that she "
            "could not run. The shepherd came with big scissors."
        ),
        "Snip, snip went the scissors, and the sheep jumped across the field, light and cool.",
    ),
    (
        (
            "One day, a doll called Rosa was left behind on a bus. She sat on the seat all alone and looked out of the"
            " window. The bus driver found her that night."
        ),
        "The driver put her in the front window, and the next day a happy girl saw her doll there.",
    ),
    (
        (
            "Once there was a giant named Ugo who was very lonely. His steps shook the ground, so people ran away from"
            " him. One day the bridge to the village broke."
        ),
        "The giant lay down across the river, and everyone walked over his back and thanked him.",
    ),
    (
        (
            "Once upon a time there was a little girl named Suki who loved to paint. She ran out of blue paint, and "
            "her picture had no sky. She thought and looked out of the window."
        ),
        "The sun was going down, so Suki painted a sky of pink and orange instead.",
    ),
    (
        (
            "One day, a lion named Rory had a thorn in his paw. He roared so loud that nobody dared to come near. Only"
            " a small hedgehog was brave enough."
        ),
        "The hedgehog pulled out the thorn, and the lion let him ride on his mane.",
    ),
    (
        (
            "There was once a teapot named Polly who had a crack. Nobody wanted to use her for tea any more. She stood"
            " on a shelf and was full of dust."
        ),
        "A boy filled her with soil and planted a flower, and she became the prettiest pot of all.",
    ),
    (
        (
            "Once upon a time there was a whale called Bluebell who sang under the water. A little fish was lost and "
            "could not find the reef. It was dark and deep."
        ),
        "The fish followed the sweet song through the dark water and found the reef again.",
    ),
    (
        (
            "One day, a boy named Ezra found a wallet at the playground. There was a lot of money inside. He thought "
            "about all the candy he could buy."
        ),
        "But he gave the wallet back to the old man who had lost it, and the man thanked him.",
    ),
    (
        (
            "Once there was a hen named Henrietta who sat on an odd egg. It was bigger than the others and it was "
            "blue. All the animals came to look."
        ),
        "Crack went the blue egg, and out came a baby duck that called the hen Mama.",
    ),
    (
        (
            "Once upon a time there was a wizard named Merv who had lost his hat. Without the hat, none of his spells "
            "came out right. He tried to make soup and made a pile of socks."
        ),
        "His cat was sleeping inside the hat, and when she woke up, the spells worked again.",
    ),
    (
        (
            "One day, a girl called Noor made a card for her teacher. She used so much glue that the card stuck to the"
            " table. She did not know what to do."
        ),
        "Her teacher laughed and said that it was the best table she had ever been given.",
    ),
    (
        (
            "There was once a little tree named Sprig who stood alone on a hill. He had no birds and no friends. One "
            "spring a tired robin sat on his branch."
        ),
        "The robin built a nest there, and soon the little tree was full of happy songs.",
    ),
    (
        (
            "Once upon a time there was a monkey called Bongo who took all the bananas. The other monkeys had nothing "
            "to eat. That night Bongo's belly hurt very much."
        ),
        "In the morning he shared the rest of the bananas and never took them all again.",
    ),
    (
        (
            "One day, a boy named Soren and his mom went to see the snow. He had never made a snow angel before. He "
            "lay down and moved his arms and legs."
        ),
        "When he got up, there was an angel with wide white wings, and his mom took a picture.",
    ),
    (
        (
            "Once there was a knight named Sir Percy who was afraid of spiders. The king sent him to a dark cave to "
            "find a lost sheep. A big spider sat at the door."
        ),
        "The spider only wanted to say hello, and it showed the knight where the lost sheep was.",
    ),
    (
        (
            "Once upon a time there was a seal named Splash who balanced balls at the zoo. One day the ball rolled out"
            " of the gate and down the road. All the children ran after it."
        ),
        "A boy on a red scooter caught the ball and threw it back to the seal's nose.",
    ),
    (
        (
            "One day, a girl named Maeve wanted to stay up all night. She drank water and sang songs so she would not "
            "sleep. Her teddy sat next to her."
        ),
        "But soon her eyes closed, and the sun found her asleep with her teddy in her arms.",
    ),
    (
        (
            "There was once a cook named Pascal who put salt in the cake instead of sugar. The party was about to "
            "start. All the guests were waiting for the cake."
        ),
        "Pascal told the truth, and the guests helped him bake a new cake with lots of sugar.",
    ),
    (
        (
            "Once upon a time there was a caterpillar called Inch who was always hungry. All the other bugs had wings,"
            " and Inch wanted to fly too. One day Inch felt very sleepy."
        ),
        "After a long sleep in a soft bed of silk, the caterpillar had two bright wings.",
    ),
    (
        (
            "One day, a boy named Hamid heard a noise under his bed. It went scratch, scratch, scratch. He took his "
            "flashlight and looked."
        ),
        "It was only his hamster, who had made a nest out of an old sock under the bed.",
    ),
    (
        (
            "Once there was a camel named Sandy who carried water in the desert. A traveler had lost his way and was "
            "very thirsty. The camel could see that he was weak."
        ),
        "The camel knelt down so the man could drink, and then she carried him to the town.",
    ),
    (
        (
            "Once upon a time there was a violin named Viola who lived in a shop. Nobody bought her because she was "
            "old and brown. One day a small girl picked up the bow."
        ),
        "The music was so sweet that people stopped in the street, and the girl took her home.",
    ),
    (
        (
            "One day, a piglet called Truffle wanted to be clean like the cat. He stayed out of the mud all day and "
            "was hot and sad. The cat saw his red nose."
        ),
        "The cat said that mud was good for pigs, so he jumped in and felt cool and happy.",
    ),
    (
        (
            "There was once a mail carrier named Lowell who had a letter with no name on it. It only said, for the one"
            " who feels alone. He thought about it all the way."
        ),
        "He gave the letter to the old lady on the corner, and her eyes filled with happy tears.",
    ),
    (
        (
            "Once upon a time there was a zebra named Zora who wanted spots. She rolled in wet mud until she was brown"
            " all over. Her own mother did not know her."
        ),
        "Then the rain washed off the mud, and she was happy to see her black and white stripes.",
    ),
)
COUNT = len(STORIES)


def items(units: Sequence[int], rng: random.Random) -> list[Item]:
    """One item for each of `units`, at least four, in their order; the distractors are other units' endings."""
    return draw.matches([(opening, f" {ending}") for opening, ending in STORIES], units, rng)
