//go:build !failpoints

package failpoint

// Enabled says whether this program was built with the tag.
const Enabled = false

// Hit does nothing, and its calls vanish.
func Hit(string) {}
