package guest

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// list reads an archive back: names and modes, in order.
func list(t *testing.T, b []byte) []string {
	t.Helper()
	field := func(off, i int) int {
		n, err := strconv.ParseUint(string(b[off+6+8*i:off+14+8*i]), 16, 32)
		if err != nil {
			t.Fatal(err)
		}
		return int(n)
	}
	up := func(n int) int { return (n + 3) &^ 3 }
	var out []string
	for off := 0; ; {
		if string(b[off:off+6]) != "070701" {
			t.Fatalf("no header at %d", off)
		}
		name := string(b[off+110 : off+109+field(off, 11)])
		if name == "TRAILER!!!" {
			return out
		}
		out = append(out, fmt.Sprintf("%s %o", name, field(off, 1)))
		off = up(off+110+field(off, 11)) + up(field(off, 6))
	}
}

func TestArchive(t *testing.T) {
	build := func() []byte {
		tr := tree{}
		tr.file("b/c/file", 0o755, []byte("hello"))
		tr.link("a", "b")
		tr.dir("tmp", 0o1777)
		var buf bytes.Buffer
		if err := tr.write(&buf); err != nil {
			t.Fatal(err)
		}
		return buf.Bytes()
	}
	first := build()
	if !bytes.Equal(first, build()) {
		t.Error("same files, other bytes")
	}
	got := strings.Join(list(t, first), "; ")
	if want := "a 120777; b 40755; b/c 40755; b/c/file 100755; tmp 41777"; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

// fakeModule is the least ELF file that has a .modinfo.
func fakeModule(depends string) []byte {
	info := []byte("license=GPL\x00depends=" + depends + "\x00")
	names := []byte("\x00.modinfo\x00.shstrtab\x00")
	var b bytes.Buffer
	le := func(v any) { _ = binary.Write(&b, binary.LittleEndian, v) }
	b.WriteString("\x7fELF\x02\x01\x01" + strings.Repeat("\x00", 9))
	le([]uint16{1, 62})
	le(uint32(1))
	le([]uint64{0, 0, uint64(64 + len(info) + len(names))})
	le(uint32(0))
	le([]uint16{64, 0, 0, 64, 3, 2})
	b.Write(info)
	b.Write(names)
	section := func(name, kind uint32, off, size int) {
		le([]uint32{name, kind})
		le([]uint64{0, 0, uint64(off), uint64(size)})
		le([]uint32{0, 0})
		le([]uint64{1, 0})
	}
	section(0, 0, 0, 0)
	section(1, 1, 64, len(info))
	section(10, 3, 64+len(info), len(names))
	return b.Bytes()
}

func TestModulesComeAfterWhatTheyNeed(t *testing.T) {
	dir := t.TempDir()
	kernel := filepath.Join(dir, "kernel", "drivers")
	if err := os.MkdirAll(kernel, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, depends := range map[string]string{"top-one": "mid,core", "mid": "core,built_in", "core": "", "solo": ""} {
		if err := os.WriteFile(filepath.Join(kernel, name+".ko"), fakeModule(depends), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "modules.builtin"), []byte("kernel/lib/built-in.ko\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	m, err := openModules(dir)
	if err != nil {
		t.Fatal(err)
	}
	have := map[string]bool{}
	mods, err := m.load(context.Background(), []string{"top_one", "solo", "mid"}, have)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, mod := range mods {
		names = append(names, mod.name)
	}
	if got := strings.Join(names, " "); got != "core mid top_one solo" {
		t.Errorf("order: %s", got)
	}
	if _, err := m.load(context.Background(), []string{"absent"}, have); err == nil {
		t.Error("a module that is not there was taken")
	}
}

func TestVmlinuxLeavesOtherKernelsAlone(t *testing.T) {
	in := []byte("an arm64 Image")
	if out, err := Vmlinux(context.Background(), in); err != nil || !bytes.Equal(in, out) {
		t.Errorf("%q, %v", out, err)
	}
	bad := make([]byte, 0x300)
	copy(bad[0x202:], "HdrS")
	bad[0x24c] = 0xff
	if _, err := Vmlinux(context.Background(), bad); err == nil {
		t.Error("a payload outside the file was taken")
	}
}
