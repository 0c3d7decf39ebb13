"""The zoo: small clean and backdoored models, made from recipes, on which the scanner is calibrated and tested."""
