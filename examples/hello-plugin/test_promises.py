from kvcomp_hello import HelloKeyNorm

import kvcomp.testing


def test_every_promise():
    kvcomp.testing.check(HelloKeyNorm)
