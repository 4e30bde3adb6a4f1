"""How steady does a trained network get without training?"""
