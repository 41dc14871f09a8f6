package sources

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
)

func TestScan(t *testing.T) {
	h := newHost(t)
	h.define("", "net", "vm.toml", "role = \"net\"\n")
	h.define(partA, "mail",
		"vm.toml", "memory_mib = 1024\nvcpus = 2\ntemplate = true\n[labels]\ntier = \"low\"\n[[grant]]\ncapability = \"fs:ro:self:/mail\"\nttl = \"1h\"\nlabel = \"mail\"\n",
		"cmdline", "quiet console=hvc0\n", "uuid", vmOne+"\n", "initrd", "cpio", "blk/b.img", "b", "blk/a.img", "a", "blk/README", "", "providers/net/web", "")
	h.define(partB, "mail")
	inv := h.scan()
	if len(inv.Problems) > 0 {
		t.Fatal(inv.Problems)
	}
	if got, want := inv.aliases(), "builtin/net "+partA+"/mail "+partB+"/mail"; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
	if len(inv.Partitions) != 2 || inv.Partitions[0].ID.String() != partA || !inv.Partitions[0].Writable || inv.Partitions[0].OwnerUID != uint32(os.Getuid()) {
		t.Errorf("got %+v", inv.Partitions)
	}
	d := inv.Definitions[1]
	if d.ID.String() != vmOne || d.MemoryMiB != 1024 || d.VCPUs != 2 || !d.Template || d.Role != RoleApp || d.Labels["tier"] != "low" ||
		d.Cmdline != "quiet console=hvc0" || d.Unwritten || len(d.Grants) != 1 || d.Grants[0] != (DeclaredGrant{"fs:ro:self:/mail", 3600, "mail"}) {
		t.Errorf("got %+v", d)
	}
	for _, d := range inv.Definitions {
		b, err := d.OpenBoot()
		if err != nil {
			t.Fatal(err)
		}
		if text, _ := io.ReadAll(b.Kernel); string(text) != "kernel" {
			t.Errorf("kernel %q", text)
		}
		if d.ID.String() == vmOne && (b.Initrd == nil || len(b.Disks) != 2 || b.Disks[0].Name != "a.img" || !b.Disks[0].ReadOnly) {
			t.Errorf("got %+v", b)
		}
		b.Close()
	}
}

func TestUUIDIsWrittenOnce(t *testing.T) {
	h := newHost(t)
	dir := h.define(partA, "mail")
	first := h.scan().Definitions[0]
	if first.ID.Version() != 4 || first.Unwritten {
		t.Fatalf("got %+v", first)
	}
	b, err := os.ReadFile(dir + "/uuid")
	if err != nil || string(b) != first.ID.String()+"\n" {
		t.Errorf("uuid holds %q, %v", b, err)
	}
	if again := h.scan().Definitions[0]; again.ID != first.ID {
		t.Errorf("first %s, then %s", first.ID, again.ID)
	}
	left, _ := filepath.Glob(dir + "/.uuid*")
	if len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestUUIDFromTheLedger(t *testing.T) {
	h := newHost(t)
	dir := h.define(partA, "mail")
	known := uuid.MustParse(vmOne)
	o := h.options()
	o.KnownIDs = func(p uuid.UUID, alias string) (uuid.UUID, bool) {
		return known, p.String() == partA && alias == "mail"
	}
	// It is written as soon as it can be.
	if d := h.scanWith(o).Definitions[0]; d.ID != known || d.Unwritten {
		t.Errorf("got %+v", d)
	}
	if b, _ := os.ReadFile(dir + "/uuid"); string(b) != vmOne+"\n" {
		t.Errorf("uuid holds %q", b)
	}
	// A read-only partition keeps what the ledger knows.
	def, err := openTree(HostPath(dir), beneathFlags)
	if err != nil {
		t.Fatal(err)
	}
	defer def.close()
	if err := os.Remove(dir + "/uuid"); err != nil {
		t.Fatal(err)
	}
	s := source{partition: uuid.MustParse(partA), opts: o}
	if id, unwritten, err := s.identify(def, "mail"); id != known || !unwritten || err != nil {
		t.Errorf("got %s, %v, %v", id, unwritten, err)
	}
	if _, err := os.Lstat(dir + "/uuid"); err == nil {
		t.Error("it was written nevertheless")
	}
}

func TestWriteUUIDNeverReplaces(t *testing.T) {
	h := newHost(t)
	dir := h.define(partA, "mail")
	outside := h.write(h.partitions+"/outside", "precious")
	if err := os.Symlink(outside, dir+"/uuid"); err != nil {
		t.Fatal(err)
	}
	def, err := openTree(HostPath(dir), beneathFlags)
	if err != nil {
		t.Fatal(err)
	}
	defer def.close()
	if err := writeUUID(def, uuid.New()); !errors.Is(err, os.ErrExist) {
		t.Errorf("got %v", err)
	}
	if b, _ := os.ReadFile(outside); string(b) != "precious" {
		t.Errorf("outside holds %q", b)
	}
	problem(t, h.scan(), "mail/uuid", "symbolic link")
}

// TestBadDefinitions: each is refused for its reason, and the good one beside
// it is found.
func TestBadDefinitions(t *testing.T) {
	for _, c := range []struct {
		name string
		make func(h *host, dir string)
		file string
		line int
		says string
	}{
		{"unknown key", func(h *host, d string) { h.write(d+"/vm.toml", "vcpus = 1\n\nmemory = 5\n") }, "bad/vm.toml", 3, "memory: has wrong contents: unknown key"},
		{"syntax", func(h *host, d string) { h.write(d+"/vm.toml", "vcpus = 1\nrole = [\n") }, "bad/vm.toml", 2, "wrong contents"},
		{"system role", func(h *host, d string) { h.write(d+"/vm.toml", "role = \"usb\"\n") }, "bad/vm.toml", 0, "role usb is for built-in definitions only"},
		{"unknown role", func(h *host, d string) { h.write(d+"/vm.toml", "role = \"king\"\n") }, "bad/vm.toml", 0, "role king is unknown"},
		{"huge vm.toml", func(h *host, d string) { h.write(d+"/vm.toml", strings.Repeat("# x\n", MaxVMToml/4+1)) }, "bad/vm.toml", 0, "is too large"},
		{"FIFO vm.toml", func(h *host, d string) { _ = syscall.Mkfifo(d+"/vm.toml", 0o666) }, "bad/vm.toml", 0, "a FIFO"},
		{"symlinked vm.toml", func(h *host, d string) { _ = os.Symlink("/etc/passwd", d+"/vm.toml") }, "bad/vm.toml", 0, "symbolic link"},
		{"symlinked kernel", func(h *host, d string) {
			_ = errors.Join(os.Remove(d+"/vmlinux"), os.Symlink("/etc/passwd", d+"/vmlinux"))
		}, "bad/vmlinux", 0, "symbolic link"},
		{"no kernel", func(h *host, d string) { _ = os.Remove(d + "/vmlinux") }, "bad/vmlinux", 0, "does not exist"},
		{"initrd is a directory", func(h *host, d string) { _ = os.Mkdir(d+"/initrd", 0o755) }, "bad/initrd", 0, "is a directory, not a regular file"},
		{"disk is a FIFO", func(h *host, d string) { _ = os.Mkdir(d+"/blk", 0o755); _ = syscall.Mkfifo(d+"/blk/a.img", 0o666) }, "blk/a.img", 0, "a FIFO"},
		{"too many disks", func(h *host, d string) {
			for i := range MaxDisks + 1 {
				h.write(fmt.Sprintf("%s/blk/%d.img", d, i), "")
			}
		}, "bad/blk", 0, "at most 16 images"},
		{"cmdline with a newline", func(h *host, d string) { h.write(d+"/cmdline", "a\nb\n") }, "bad/cmdline", 0, "one line"},
		{"uuid of another version", func(h *host, d string) { h.write(d+"/uuid", "aaaaaaaa-aaaa-1aaa-8aaa-aaaaaaaaaaaa\n") }, "bad/uuid", 0, "version 4"},
		{"uuid in upper case", func(h *host, d string) { h.write(d+"/uuid", strings.ToUpper(vmOne)) }, "bad/uuid", 0, "lower case"},
		{"empty uuid", func(h *host, d string) { h.write(d+"/uuid", "") }, "bad/uuid", 0, "version 4"},
		{"a file in its place", func(h *host, d string) { _ = os.RemoveAll(d); h.write(d, "") }, "data/bad", 0, "not a directory"},
		{"a symlink in its place", func(h *host, d string) { _ = os.RemoveAll(d); _ = os.Symlink("good", d) }, "data/bad", 0, "symbolic link"},
		{"a name that drives terminals", func(h *host, d string) { _ = os.Rename(d, filepath.Dir(d)+"/\x1b[2Jx") }, `"\x1b[2Jx"`, 0, "has the form"},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHost(t)
			c.make(h, h.define(partA, "bad"))
			h.define(partA, "good")
			inv := h.scan()
			if got := inv.aliases(); got != partA+"/good" {
				t.Errorf("found %q", got)
			}
			p := problem(t, inv, c.file, c.says)
			if p.Line != c.line {
				t.Errorf("line %d, want %d: %v", p.Line, c.line, p)
			}
			if len(inv.Problems) != 1 {
				t.Errorf("got %v", inv.Problems)
			}
		})
	}
}

func TestTooManyDefinitions(t *testing.T) {
	h := newHost(t)
	for i := range MaxDefinitions + 1 {
		h.define(partA, fmt.Sprintf("vm%d", i))
	}
	h.define(partB, "mail")
	inv := h.scan()
	problem(t, inv, "svc/data", "at most 256 definitions, and there are 257")
	if got := inv.aliases(); got != partB+"/mail" {
		t.Errorf("found %q", got)
	}
	for i := range maxEntries {
		h.write(fmt.Sprintf("%s/%s/svc/data/.%d", h.partitions, partA, i), "")
	}
	problem(t, h.scan(), "svc/data", "at most 1024 entries")
}

func TestSameUUID(t *testing.T) {
	h := newHost(t)
	h.define(partA, "mail", "uuid", vmOne)
	h.define(partB, "thief", "uuid", vmOne)
	h.define(partB, "other")
	inv := h.scan()
	if got := inv.aliases(); got != partB+"/other" {
		t.Errorf("found %q", got)
	}
	for file, other := range map[string]string{"mail/uuid": partB + "/thief", "thief/uuid": partA + "/mail"} {
		p := problem(t, inv, file, "have the same UUID "+vmOne)
		if !strings.Contains(p.Reason, other) || !strings.Contains(p.Reason, filepath.Base(filepath.Dir(string(p.File)))) {
			t.Errorf("does not name both: %s", p.Reason)
		}
	}
	// Bound to one of them, it stays that one's.
	o := h.options()
	o.BoundTo = func(vm uuid.UUID) (uuid.UUID, bool) { return uuid.MustParse(partA), vm.String() == vmOne }
	inv = h.scanWith(o)
	if got := inv.aliases(); got != partA+"/mail "+partB+"/other" {
		t.Errorf("found %q", got)
	}
	problem(t, inv, "thief/uuid", "belongs to a VM of partition "+partA)
}

func TestWrongPartitions(t *testing.T) {
	h := newHost(t)
	p := h.partition(partA)
	h.write(h.partitions+"/lost+found/x", "")
	h.write(h.partitions+"/.hidden/x", "")
	if err := os.Symlink(string(p.Dir), filepath.Join(h.partitions, partB)); err != nil {
		t.Fatal(err)
	}
	inv := h.scan()
	if len(inv.Partitions) != 1 || len(inv.Problems) != 2 {
		t.Errorf("got %+v, %v", inv.Partitions, inv.Problems)
	}
	problem(t, inv, "lost+found", "named by its UUID")
	problem(t, inv, partB, "not a directory")
}

func TestScanWithoutDirectories(t *testing.T) {
	if _, err := Scan(t.Context(), Options{Builtin: "/nonexistent/builtin"}); !errors.Is(err, ErrNotFound) {
		t.Errorf("got %v", err)
	}
	if inv, err := Scan(t.Context(), Options{}); err != nil || len(inv.Problems) > 0 {
		t.Errorf("got %v, %v", inv, err)
	}
}

func TestBuiltinFollowsSymlinks(t *testing.T) {
	h := newHost(t)
	kernel := h.write(h.partitions+"/../store/vmlinux", "stored")
	dir := h.define("", "net", "vm.toml", "role = \"net\"")
	if err := errors.Join(os.Remove(dir+"/vmlinux"), os.Symlink(kernel, dir+"/vmlinux")); err != nil {
		t.Fatal(err)
	}
	inv := h.scan()
	if len(inv.Problems) > 0 {
		t.Fatal(inv.Problems)
	}
	b, err := inv.Definitions[0].OpenBoot()
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if text, _ := io.ReadAll(b.Kernel); string(text) != "stored" {
		t.Errorf("kernel %q", text)
	}
}

func TestOpenBootRefuses(t *testing.T) {
	h := newHost(t)
	dir := h.define(partA, "mail", "blk/root.img", "raw")
	d := h.scan().Definitions[0]
	h.write(dir+"/blk/root.img", "QFI\xfb and a backing file")
	if _, err := d.OpenBoot(); !errors.Is(err, ErrContents) || !strings.Contains(err.Error(), "not a raw image") {
		t.Errorf("a qcow2 image: %v", err)
	}
	if err := errors.Join(os.Remove(dir+"/blk/root.img"), unix.Mkfifo(dir+"/blk/root.img", 0o600)); err != nil {
		t.Fatal(err)
	}
	if _, err := d.OpenBoot(); !errors.Is(err, ErrFileType) {
		t.Errorf("a FIFO: %v", err)
	}
	d.Dir = HostPath(h.builtin)
	if _, err := d.OpenBoot(); !errors.Is(err, ErrEscapes) {
		t.Errorf("a directory elsewhere: %v", err)
	}
}

func TestReadPolicy(t *testing.T) {
	h := newHost(t)
	p := h.partition(partA)
	if _, _, _, err := p.ReadPolicy(); !errors.Is(err, ErrNotFound) {
		t.Errorf("no directory: %v", err)
	}
	dir := filepath.Join(string(p.Dir), "svc/policy")
	h.write(dir+"/a.rego", "package a")
	h.write(dir+"/README", "no policy")
	h.write(dir+"/data.yaml", "x: 1")
	for name, read := range map[string]func() (map[string][]byte, []byte, string, error){
		"partition": p.ReadPolicy, "host": func() (map[string][]byte, []byte, string, error) { return ReadPolicyDir(HostPath(dir)) },
	} {
		files, data, dataName, err := read()
		if err != nil || len(files) != 1 || string(files["a.rego"]) != "package a" || string(data) != "x: 1" || dataName != "data.yaml" {
			t.Errorf("%s: %v, %q, %s, %v", name, files, data, dataName, err)
		}
	}
	for _, c := range []struct {
		name string
		make func()
		want error
	}{
		{"data twice", func() { h.write(dir+"/data.json", "{}") }, ErrContents},
		{"a symlink", func() { _ = os.Symlink("/etc/passwd", dir+"/z.rego") }, ErrSymlink},
		{"a FIFO", func() { _ = syscall.Mkfifo(dir+"/z.rego", 0o666) }, ErrFileType},
		{"a large file", func() { h.write(dir+"/z.rego", strings.Repeat("#", MaxPolicyFile+1)) }, ErrTooLarge},
		{"too many files", func() {
			for i := range MaxPolicyFiles {
				h.write(fmt.Sprintf("%s/z%d.rego", dir, i), "")
			}
		}, ErrTooMany},
		{"too much", func() {
			for i := range 9 {
				h.write(fmt.Sprintf("%s/z%d.rego", dir, i), strings.Repeat("#", MaxPolicyFile))
			}
		}, ErrTooLarge},
	} {
		c.make()
		if _, _, _, err := p.ReadPolicy(); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", c.name, err)
		}
		for _, glob := range []string{"/z*", "/data.json"} {
			found, _ := filepath.Glob(dir + glob)
			for _, f := range found {
				_ = os.Remove(f)
			}
		}
	}
}

// TestDescriptorsAreClosed: a partition must be able to go at any time.
func TestDescriptorsAreClosed(t *testing.T) {
	h := newHost(t)
	h.define(partA, "mail", "blk/a.img", "QFI\xfb")
	h.define(partA, "bad", "vm.toml", "x = 1")
	p := h.partition(partA)
	h.write(filepath.Join(string(p.Dir), "svc/policy/a.rego"), "package a")
	count := func() int {
		fds, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(fds)
	}
	d := h.scan().Definitions[0]
	before := count()
	for range 10 {
		h.scan()
		_, _ = d.OpenBoot()
		_, _, _, _ = p.ReadPolicy()
		_, _ = p.Open(rel(t, "/none/x"))
	}
	if after := count(); after > before {
		t.Errorf("%d descriptors before, %d after", before, after)
	}
}
