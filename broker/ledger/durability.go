//go:build !failpoints

package ledger

// durability is SQLite's synchronous: what Update returned survives a power
// cut.
func durability() string { return "FULL" }
