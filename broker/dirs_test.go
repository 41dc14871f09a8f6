package broker

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestOwnDir(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a", "b")
	if err := ownDir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	if err := ownDir(link, 0o755); err == nil || !strings.Contains(err.Error(), "symbolic link") {
		t.Errorf("a symbolic link: %v", err)
	}
	for _, mode := range []os.FileMode{0o775, 0o757} {
		if err := os.Chmod(dir, mode); err != nil {
			t.Fatal(err)
		}
		if err := ownDir(dir, 0o755); err == nil || !strings.Contains(err.Error(), "chmod go-w") {
			t.Errorf("mode %o: %v", mode, err)
		}
	}
}

func TestRuntimeDirectoryTooLongForSockets(t *testing.T) {
	o := Options{
		StateDir: "/s", VMM: "v", Virtiofsd: "v", Shim: "s", PolicyWorker: []string{"w"},
		RuntimeDir: "/run/" + strings.Repeat("x", 46),
	}
	if err := o.defaults(); err == nil || !strings.Contains(err.Error(), "has 51 bytes") || !strings.Contains(err.Error(), "leave room for 50") {
		t.Errorf("it is accepted, or refused with %v", err)
	}
	o.RuntimeDir = o.RuntimeDir[:50]
	if err := o.defaults(); err != nil {
		t.Errorf("the longest that fits is refused: %v", err)
	}
}
