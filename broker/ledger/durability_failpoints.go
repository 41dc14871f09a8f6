//go:build failpoints

package ledger

import (
	"cmp"
	"os"
)

// durability can be turned down by the environment in a broker that is built to
// be tested, so that a test can show that it would be noticed.
func durability() string { return cmp.Or(os.Getenv("SPECTRUM_LEDGER_SYNCHRONOUS"), "FULL") }
