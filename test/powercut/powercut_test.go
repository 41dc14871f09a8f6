package powercut

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"testing"
	"time"
)

// mounted is a disk and where it is.
func mounted(t *testing.T, d *Disk) (*Mount, string) {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("SKIP: NOTHING about power cuts is tested: it takes root to mount a file system")
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skipf("SKIP: NOTHING about power cuts is tested: this machine has no FUSE: %v", err)
	}
	m, err := d.Mount(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil && !errors.Is(err, syscall.EINVAL) { // closed by the test
			t.Error(err)
		}
	})
	return m, m.Dir
}

type disk struct {
	t   *testing.T
	dir string
}

func (d disk) must(err error) {
	d.t.Helper()
	if err != nil {
		d.t.Fatal(err)
	}
}

func (d disk) at(name string) string { return filepath.Join(d.dir, name) }

func (d disk) put(name, text string, sync bool) {
	d.t.Helper()
	f, err := os.OpenFile(d.at(name), os.O_CREATE|os.O_RDWR, 0o600)
	d.must(err)
	_, err = f.WriteString(text)
	d.must(err)
	if sync {
		d.must(f.Sync())
	}
	d.must(f.Close())
}

func (d disk) sync(name string) {
	d.t.Helper()
	f, err := os.Open(d.at(name))
	d.must(err)
	d.must(errors.Join(f.Sync(), f.Close()))
}

// TestWhatSurvives is the model, sentence by sentence: what a power cut that
// takes all it may leaves, and what is there when it takes nothing.
func TestWhatSurvives(t *testing.T) {
	const gone = "\x00gone"
	for name, c := range map[string]struct {
		before, do func(d disk)
		want       map[string]string // after all is lost
		all        map[string]string // after nothing is
	}{
		"data that was not synced": {
			func(d disk) { d.put("a", "old", true); d.sync(".") },
			func(d disk) { d.put("a", "new, and longer", false) },
			map[string]string{"a": "old"},
			map[string]string{"a": "new, and longer"},
		},
		"data that was synced": {
			nil, func(d disk) { d.put("a", "new", true); d.sync(".") },
			map[string]string{"a": "new"},
			map[string]string{"a": "new"},
		},
		"a file whose name was not synced": {
			nil, func(d disk) { d.put("a", "new", true) },
			map[string]string{"a": gone},
			map[string]string{"a": "new"},
		},
		"a name whose file was not synced": {
			nil, func(d disk) { d.put("a", "new", false); d.sync(".") },
			map[string]string{"a": ""},
			map[string]string{"a": "new"},
		},
		"another file's sync": {
			nil, func(d disk) { d.put("a", "new", false); d.put("b", "new", true); d.sync(".") },
			map[string]string{"a": "", "b": "new"},
			map[string]string{"a": "new", "b": "new"},
		},
		"a rename": {
			func(d disk) { d.put("a", "old", true); d.put("b", "new", true); d.sync(".") },
			func(d disk) { d.must(os.Rename(d.at("b"), d.at("a"))) },
			map[string]string{"a": "old", "b": "new"},
			map[string]string{"a": "new", "b": gone},
		},
		"a rename whose directory was synced": {
			func(d disk) { d.put("a", "old", true); d.put("b", "new", true); d.sync(".") },
			func(d disk) { d.must(os.Rename(d.at("b"), d.at("a"))); d.sync(".") },
			map[string]string{"a": "new", "b": gone},
			nil,
		},
		"a link": {
			func(d disk) { d.put("a", "old", true); d.sync(".") },
			func(d disk) { d.must(os.Link(d.at("a"), d.at("b"))) },
			map[string]string{"a": "old", "b": gone},
			map[string]string{"a": "old", "b": "old"},
		},
		"an unlink": {
			func(d disk) { d.put("a", "old", true); d.sync(".") },
			func(d disk) { d.must(os.Remove(d.at("a"))) },
			map[string]string{"a": "old"},
			map[string]string{"a": gone},
		},
		"an unlink whose directory was synced": {
			func(d disk) { d.put("a", "old", true); d.sync(".") },
			func(d disk) { d.must(os.Remove(d.at("a"))); d.sync(".") },
			map[string]string{"a": gone},
			nil,
		},
		"a size": {
			func(d disk) { d.put("a", "long", true); d.sync(".") },
			func(d disk) { d.must(os.Truncate(d.at("a"), 1)) },
			map[string]string{"a": "long"},
			map[string]string{"a": "l"},
		},
		"a size that was synced": {
			func(d disk) { d.put("a", "long", true); d.sync(".") },
			func(d disk) { d.must(os.Truncate(d.at("a"), 1)); d.must(os.Truncate(d.at("a"), 3)); d.sync("a") },
			map[string]string{"a": "l\x00\x00"},
			nil,
		},
		"a directory that was not synced into its parent": {
			nil,
			func(d disk) { d.must(os.Mkdir(d.at("sub"), 0o700)); d.put("sub/a", "new", true); d.sync("sub") },
			map[string]string{"sub/a": gone},
			map[string]string{"sub/a": "new"},
		},
		"a directory that was": {
			nil,
			func(d disk) {
				d.must(os.Mkdir(d.at("sub"), 0o700))
				d.put("sub/a", "new", true)
				d.sync("sub")
				d.sync(".")
			},
			map[string]string{"sub/a": "new"},
			nil,
		},
		"SQLite's index": {
			nil, func(d disk) { d.put("a-shm", "index", true); d.sync(".") },
			map[string]string{"a-shm": ""},
			nil,
		},
	} {
		t.Run(name, func(t *testing.T) {
			m, dir := mounted(t, New())
			at := disk{t, dir}
			if c.before != nil {
				c.before(at)
			}
			c.do(at)
			if err := m.PowerCut(func() {}); err != nil {
				t.Fatal(err)
			}
			if c.all == nil {
				c.all = c.want
			}
			for loss, want := range map[Loss]map[string]string{LoseAll: c.want, LoseNothing: c.all} {
				_, dir := mounted(t, m.Disk.Cut(rand.New(rand.NewPCG(1, 1)), loss))
				for file, text := range want {
					got, err := os.ReadFile(filepath.Join(dir, file))
					if errors.Is(err, os.ErrNotExist) {
						got, err = []byte(gone), nil
					}
					if err != nil || string(got) != text {
						t.Errorf("%s: %s is %q, %v; want %q", loss, file, got, err, text)
					}
				}
			}
		})
	}
}

// TestModes wants chmod to last from fsync on, and not from fdatasync.
func TestModes(t *testing.T) {
	for name, c := range map[string]struct {
		sync func(f *os.File) error
		want os.FileMode
	}{
		"nothing":   {func(*os.File) error { return nil }, 0o600},
		"fdatasync": {func(f *os.File) error { return syscall.Fdatasync(int(f.Fd())) }, 0o600},
		"fsync":     {(*os.File).Sync, 0o640},
	} {
		m, dir := mounted(t, New())
		d := disk{t, dir}
		d.put("a", "", true)
		d.sync(".")
		f, err := os.Open(d.at("a"))
		d.must(err)
		d.must(errors.Join(f.Chmod(0o640), c.sync(f), f.Close(), m.PowerCut(func() {})))
		_, dir = mounted(t, m.Disk.Cut(rand.New(rand.NewPCG(1, 1)), LoseAll))
		info, err := os.Stat(filepath.Join(dir, "a"))
		if err != nil || info.Mode().Perm() != c.want {
			t.Errorf("after %s: %v, %v; want %v", name, info, err, c.want)
		}
	}
}

// TestRandomLoss wants what is neither all nor nothing to be possible outcomes
// only, to be many different ones, and the same ones for the same seed.
func TestRandomLoss(t *testing.T) {
	m, dir := mounted(t, New())
	d := disk{t, dir}
	old, fresh := bytes.Repeat([]byte("o"), 4*sectorLen), bytes.Repeat([]byte("n"), 4*sectorLen)
	d.put("a", string(old), true)
	d.sync(".")
	f, err := os.OpenFile(d.at("a"), os.O_RDWR, 0)
	d.must(err)
	for at := 0; at < len(fresh); at += 2 * sectorLen {
		_, err := f.WriteAt(fresh[at:at+2*sectorLen], int64(at))
		d.must(err)
	}
	for _, name := range []string{"1", "2", "3"} {
		d.put(name, "x", true)
	}
	d.must(errors.Join(f.Close(), m.PowerCut(func() {})))
	for _, loss := range []Loss{LoseTail, LoseAny} {
		outcomes := map[string]bool{}
		for seed := range uint64(200) {
			cut := func() string {
				after := m.Disk.Cut(rand.New(rand.NewPCG(seed, 0)), loss)
				data, err := after.ReadFile("a")
				d.must(err)
				names := after.Names("/")
				if want := []string{"1", "2", "3", "a"}; !slices.Equal(names, append(slices.Clone(want[:len(names)-1]), "a")) {
					t.Errorf("%s: names in another order than they were made: %q", loss, names)
				}
				return string(data) + string(rune('0'+len(names)))
			}
			got := cut()
			if got != cut() {
				t.Fatalf("%s: seed %d gives one thing and then another", loss, seed)
			}
			outcomes[got] = true
			data := got[:len(got)-1]
			switch fresh := bytes.Count([]byte(data), []byte("n")); {
			case len(data) != len(old):
				t.Errorf("%s: %d bytes", loss, len(data))
			case loss == LoseTail && data[:fresh] != string(bytes.Repeat([]byte("n"), fresh)):
				t.Errorf("%s: a later write survived an earlier one", loss)
			case loss == LoseAny && fresh%sectorLen != 0:
				t.Errorf("%s: a sector of %d bytes", loss, fresh%sectorLen)
			}
		}
		if len(outcomes) < 20 {
			t.Errorf("%s: only %d outcomes", loss, len(outcomes))
		}
	}
}

// TestStopAt turns the power off at every change of a short story, and wants
// exactly what was synced until then.
func TestStopAt(t *testing.T) {
	for n, want := range []string{"old", "old", "one", "one"} {
		m, dir := mounted(t, New())
		d := disk{t, dir}
		d.put("a", "old", true)
		d.sync(".")
		f, err := os.OpenFile(d.at("a"), os.O_RDWR, 0)
		d.must(err)
		m.Disk.StopAt(n + 1)
		done := make(chan int, 1)
		go func() {
			for i, step := range []func() error{
				func() error { _, err := f.WriteAt([]byte("one"), 0); return err },
				f.Sync,
				func() error { _, err := f.WriteAt([]byte("two"), 0); return err },
				f.Sync,
			} {
				if step() != nil {
					done <- i
					return
				}
			}
			done <- -1
		}()
		select {
		case <-m.Disk.Off():
		case <-time.After(20 * time.Second):
			t.Fatal("the power does not go off")
		}
		d.must(m.Close())
		if at := <-done; at != n {
			t.Errorf("stopped after %d changes, want %d", at, n)
		}
		_ = f.Close()
		if got, err := m.Disk.Cut(rand.New(rand.NewPCG(1, 1)), LoseAll).ReadFile("a"); err != nil || string(got) != want {
			t.Errorf("the power went after %d changes: %q, %v; want %q", n, got, err, want)
		}
	}
}

// TestFaults wants each fault to be what it says, and nothing after it.
func TestFaults(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(d *Disk)
		do    func(d disk, f *os.File) error
		err   error
		reads string // by a program, while it is so
		lasts string // after it is healed, a sync that succeeds, and a power cut
	}{
		"a full disk": {
			func(d *Disk) { d.Room(0) },
			func(_ disk, f *os.File) error { _, err := f.WriteAt([]byte("12345"), 3); return err },
			syscall.ENOSPC, "old", "old",
		},
		"a full disk tears a write": {
			func(d *Disk) { d.Room(2) },
			func(_ disk, f *os.File) error { _, err := f.WriteAt([]byte("1234567890"), 0); return err },
			syscall.ENOSPC, "12345", "12345",
		},
		"a full disk takes what needs no room": {
			func(d *Disk) { d.Room(0) },
			func(_ disk, f *os.File) error { _, err := f.WriteAt([]byte("123"), 0); return err },
			nil, "123", "123",
		},
		"a read-only disk": {
			func(d *Disk) { d.ReadOnly() },
			func(_ disk, f *os.File) error { _, err := f.WriteAt([]byte("123"), 0); return err },
			syscall.EROFS, "old", "old",
		},
		"a read-only disk and a new file": {
			func(d *Disk) { d.ReadOnly() },
			func(d disk, _ *os.File) error { return os.WriteFile(d.at("b"), nil, 0o600) },
			syscall.EROFS, "old", "old",
		},
		"the second write fails": {
			func(d *Disk) { d.Break(Fault{Op: Write, After: 1, Times: 1, Err: syscall.EIO}) },
			func(_ disk, f *os.File) error {
				_, first := f.WriteAt([]byte("1"), 0)
				_, second := f.WriteAt([]byte("2"), 1)
				_, third := f.WriteAt([]byte("3"), 2)
				if first != nil || third != nil {
					return errors.New("another one failed")
				}
				return second
			},
			syscall.EIO, "1l3", "1l3",
		},
		"another file's fault": {
			func(d *Disk) { d.Break(Fault{Op: Write, Name: "b*", Err: syscall.EIO}) },
			func(_ disk, f *os.File) error { _, err := f.WriteAt([]byte("new"), 0); return err },
			nil, "new", "new",
		},
		"a torn write": {
			func(d *Disk) { d.Break(Fault{Op: Write, Err: syscall.EIO, Torn: 2}) },
			func(_ disk, f *os.File) error { _, err := f.WriteAt([]byte("new"), 0); return err },
			syscall.EIO, "ned", "ned",
		},
		"a torn write that nobody is told of": {
			func(d *Disk) { d.Break(Fault{Op: Write, Torn: 2}) },
			func(_ disk, f *os.File) error { _, err := f.WriteAt([]byte("new"), 0); return err },
			nil, "ned", "ned",
		},
		"a sync that fails and loses": {
			func(d *Disk) { d.Break(Fault{Op: Sync, Times: 1, Err: syscall.EIO, Lost: true}) },
			func(_ disk, f *os.File) error {
				_, err := f.WriteAt([]byte("new"), 0)
				return errors.Join(err, f.Sync())
			},
			syscall.EIO, "new", "old",
		},
		"a sync that fails and does not lose": {
			func(d *Disk) { d.Break(Fault{Op: Sync, Times: 1, Err: syscall.EIO}) },
			func(_ disk, f *os.File) error {
				_, err := f.WriteAt([]byte("new"), 0)
				return errors.Join(err, f.Sync())
			},
			syscall.EIO, "new", "new",
		},
		"a disk that lies": {
			func(d *Disk) { d.Break(Fault{Op: Sync, Lost: true}) },
			func(_ disk, f *os.File) error {
				_, err := f.WriteAt([]byte("new"), 0)
				return errors.Join(err, f.Sync())
			},
			nil, "new", "old",
		},
		"a byte flipped at rest": {
			func(d *Disk) { _ = d.Flip("a", 1) },
			func(disk, *os.File) error { return nil },
			nil, "omd", "omd",
		},
		"a byte flipped as it is read": {
			func(d *Disk) { d.Break(Fault{Op: Read, Flip: true}) },
			func(disk, *os.File) error { return nil },
			nil, "nld", "old",
		},
	} {
		t.Run(name, func(t *testing.T) {
			m, dir := mounted(t, New())
			d := disk{t, dir}
			d.put("a", "old", true)
			d.sync(".")
			f, err := os.OpenFile(d.at("a"), os.O_RDWR, 0)
			d.must(err)
			defer f.Close()
			c.spoil(m.Disk)
			if err := c.do(d, f); !errors.Is(err, c.err) {
				t.Errorf("got %v, want %v", err, c.err)
			}
			if got, err := os.ReadFile(d.at("a")); err != nil || string(got) != c.reads {
				t.Errorf("it reads %q, %v; want %q", got, err, c.reads)
			}
			m.Disk.Heal()
			d.must(f.Sync())
			after := m.Disk.Cut(rand.New(rand.NewPCG(1, 1)), LoseAll)
			if got, err := after.ReadFile("a"); err != nil || string(got) != c.lasts {
				t.Errorf("what lasts is %q, %v; want %q", got, err, c.lasts)
			}
		})
	}
}

// TestDeletedUnderneath wants a file without a name to live on for who has it
// open, and to show that it has none.
func TestDeletedUnderneath(t *testing.T) {
	_, dir := mounted(t, New())
	d := disk{t, dir}
	d.put("a", "old", true)
	f, err := os.OpenFile(d.at("a"), os.O_RDWR, 0)
	d.must(err)
	defer f.Close()
	d.must(os.Remove(d.at("a")))
	_, err = f.WriteAt([]byte("new"), 0)
	d.must(err)
	var st syscall.Stat_t
	d.must(syscall.Fstat(int(f.Fd()), &st))
	if st.Nlink != 0 {
		t.Errorf("it has %d names", st.Nlink)
	}
	if _, err := os.Stat(d.at("a")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("its name: %v", err)
	}
}

// TestExport wants the same files on another file system, and back.
func TestExport(t *testing.T) {
	m, dir := mounted(t, New())
	d := disk{t, dir}
	d.must(os.Mkdir(d.at("sub"), 0o700))
	d.put("sub/a", "text", false)
	d.must(os.Chmod(d.at("sub/a"), 0o640))
	to := t.TempDir()
	d.must(m.Disk.Export(to))
	again := New()
	d.must(again.Import(to))
	again = again.Cut(rand.New(rand.NewPCG(1, 1)), LoseAll) // it is durable
	_, dir = mounted(t, again)
	got, err := os.ReadFile(filepath.Join(dir, "sub/a"))
	info, statErr := os.Stat(filepath.Join(dir, "sub/a"))
	if err != nil || statErr != nil || string(got) != "text" || info.Mode().Perm() != 0o640 {
		t.Errorf("%q, %v, %v", got, info, errors.Join(err, statErr))
	}
}
