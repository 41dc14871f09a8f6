package sources

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/uuid"

	"spectrum-os.org/broker/capabilities"
)

const (
	partA = "11111111-1111-4111-8111-111111111111"
	partB = "22222222-2222-4222-8222-222222222222"
	vmOne = "aaaaaaaa-aaaa-4aaa-8aaa-aaaaaaaaaaaa"
)

// A host has a built-in directory and one of partitions.
type host struct {
	t                   *testing.T
	builtin, partitions string
}

func newHost(t *testing.T) *host {
	t.Helper()
	d := t.TempDir()
	h := &host{t, filepath.Join(d, "builtin"), filepath.Join(d, "partitions")}
	for _, dir := range []string{h.builtin, h.partitions} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	return h
}

func (h *host) options() Options {
	return Options{Builtin: HostPath(h.builtin), Partitions: HostPath(h.partitions)}
}

func (h *host) write(name, contents string) string {
	h.t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		h.t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(contents), 0o644); err != nil {
		h.t.Fatal(err)
	}
	return name
}

func (h *host) partition(id string) Partition {
	h.t.Helper()
	dir := filepath.Join(h.partitions, id)
	if err := os.MkdirAll(filepath.Join(dir, "files"), 0o755); err != nil {
		h.t.Fatal(err)
	}
	return Partition{ID: uuid.MustParse(id), Dir: HostPath(dir)}
}

// define makes a definition; files are pairs of name and contents.
func (h *host) define(partition, alias string, files ...string) string {
	h.t.Helper()
	dir := filepath.Join(h.builtin, alias)
	if partition != "" {
		h.partition(partition)
		dir = filepath.Join(h.partitions, partition, "svc/data", alias)
	}
	h.write(filepath.Join(dir, "vmlinux"), "kernel")
	for i := 0; i < len(files); i += 2 {
		h.write(filepath.Join(dir, files[i]), files[i+1])
	}
	return dir
}

func (h *host) scan() *Inventory { return h.scanWith(h.options()) }

func (h *host) scanWith(o Options) *Inventory {
	h.t.Helper()
	inv, err := Scan(h.t.Context(), o)
	if err != nil {
		h.t.Fatal(err)
	}
	return inv
}

func (inv *Inventory) aliases() string {
	var all []string
	for _, d := range inv.Definitions {
		all = append(all, d.spelt())
	}
	return strings.Join(all, " ")
}

// problem asserts that there is one about file that says text.
func problem(t *testing.T, inv *Inventory, file, text string) Problem {
	t.Helper()
	for _, p := range inv.Problems {
		if strings.HasSuffix(string(p.File), file) && strings.Contains(p.Reason, text) {
			return p
		}
	}
	t.Fatalf("no problem of %q that says %q in %v", file, text, inv.Problems)
	return Problem{}
}

func rel(t *testing.T, s string) capabilities.RelPath {
	t.Helper()
	p, err := capabilities.ParseRelPath(s)
	if err != nil {
		t.Fatal(err)
	}
	return p
}
