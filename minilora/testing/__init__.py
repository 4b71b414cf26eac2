from minilora.testing.quantizer_battery import check_quantizer
from minilora.testing.lora_battery import check_lora_layer
from minilora.testing.quantizer_oracles import *
from minilora.testing.strategies import *
from minilora.testing.recipes import *
from minilora.testing.peak import peak_memory
