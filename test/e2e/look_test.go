package e2e

import (
	"fmt"
	"os"
	"testing"
)

func readFile(t *testing.T, path string) string {
	t.Helper()
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(raw)
}

// absent says whether a path is gone from the guest.
func (g *guest) absent(path string) error {
	if out, status := g.sh("ls -Ad " + path); status == 0 {
		return fmt.Errorf("the guest still has %s: %s", path, out)
	}
	return nil
}
