from model_containers.neural import *
