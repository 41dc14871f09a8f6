package keys

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/ledger"
)

func TestKeyIsMadeOnceAndOnlyForItsOwner(t *testing.T) {
	w := newWorld(t)
	first := w.start()
	info, err := os.Stat(w.path(fileName))
	if err != nil || info.Mode() != 0o600 {
		t.Errorf("mode %v, %v; want 0600", info.Mode(), err)
	}
	w.stop()
	if again := w.start(); again.kid != first.kid {
		t.Errorf("the second start has key %s, want %s", again.kid, first.kid)
	}
	w.stop()
	if names := w.files(); names != "ledger.anchor ledger.db ledger.lock signing-key.pem" {
		t.Errorf("the state directory holds %s", names)
	}
}

func TestKeyFileIsRefused(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(w *world, path string) error
		says  string
	}{
		"readable by others":   {func(_ *world, p string) error { return os.Chmod(p, 0o640) }, "(chmod 600)"},
		"another user's":       {func(_ *world, p string) error { return os.Chown(p, 12345, -1) }, "belongs to user 12345, who can read it"},
		"a link":               {func(_ *world, p string) error { return relink(p) }, "too many levels of symbolic links"},
		"a directory":          {func(_ *world, p string) error { _ = os.Remove(p); return os.Mkdir(p, 0o700) }, "it must be a file"},
		"a pipe":               {func(_ *world, p string) error { _ = os.Remove(p); return syscall.Mkfifo(p, 0o600) }, "it must be a file"},
		"cut short":            {func(_ *world, p string) error { return os.Truncate(p, 40) }, "damaged"},
		"empty":                {func(_ *world, p string) error { return os.Truncate(p, 0) }, "damaged"},
		"garbage":              {func(_ *world, p string) error { return os.WriteFile(p, bytes.Repeat([]byte{0}, 100), 0o600) }, "damaged"},
		"with more after it":   {func(_ *world, p string) error { return appendTo(p, "more") }, "damaged"},
		"with a header more":   {func(_ *world, p string) error { return replace(p, "Epoch:", "A: b\nEpoch:") }, "headers are not Ledger and Epoch"},
		"of no ledger":         {func(_ *world, p string) error { return replace(p, "Ledger: ", "Ledger: x") }, "headers are not Ledger and Epoch"},
		"with a sloppy header": {func(_ *world, p string) error { return replace(p, "Epoch: 1", "Epoch: 01") }, "not in its one form"},
		"gone":                 {func(_ *world, p string) error { return os.Remove(p) }, "there is no key file, and the ledger's is"},
		"another key":          {func(w *world, p string) error { return os.WriteFile(p, encode(newFile(w.id, 1)), 0o600) }, "and the ledger's is"},
		"another ledger's key": {func(_ *world, p string) error { return os.WriteFile(p, encode(newFile(uuid.New(), 1)), 0o600) }, "and the ledger's is"},
		"the release before's": {func(_ *world, p string) error { return os.WriteFile(p, encode(newFile(uuid.Nil, 0)), 0o600) }, "and the ledger's is"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			was := w.start().kid
			w.stop()
			if err := c.spoil(w, w.path(fileName)); err != nil {
				t.Fatal(err)
			}
			before := look(w.path(fileName))
			for range 2 {
				err := w.tryStart()
				if err == nil || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), "spectrum-cap keys rotate --state "+w.dir) {
					t.Errorf("got %v, want %q and the remedy", err, c.says)
				}
			}
			if after := look(w.path(fileName)); after != before {
				t.Errorf("the refused key was %s, and is %s", before, after)
			}
			// And the remedy works, but where a directory is in the way.
			if info, err := os.Lstat(w.path(fileName)); err == nil && info.IsDir() {
				return
			}
			kid, err := w.offline().Rotate(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if now := w.start(); now.kid != kid || kid == was {
				t.Errorf("after the remedy key %s signs, want %s, which is not %s", now.kid, kid, was)
			}
		})
	}
}

// TestOneForm: every key there can be is read back, and nothing else is.
func TestOneForm(t *testing.T) {
	for _, k := range []*file{newFile(uuid.New(), 1), newFile(uuid.New(), 1<<63), newFile(uuid.Nil, 0)} {
		text := encode(k)
		again, err := decode(text)
		if err != nil || again.kid() != k.kid() || again.ledger != k.ledger || again.epoch != k.epoch {
			t.Errorf("%s reads as %+v, %v", text, again, err)
		}
		for i := range text {
			for _, b := range []byte{0, ' ', '\n', 'A', text[i] ^ 1} {
				bad := bytes.Clone(text)
				if bad[i] == b {
					continue
				}
				bad[i] = b
				if got, err := decode(bad); err == nil && got.kid() == k.kid() && got.ledger == k.ledger && got.epoch == k.epoch {
					t.Fatalf("two texts are one key: %q and %q", text, bad)
				}
			}
		}
	}
}

// TestRetiredSeedIsDestroyed keeps the old file's inode and looks into it.
func TestRetiredSeedIsDestroyed(t *testing.T) {
	w := newWorld(t)
	r := w.start()
	if err := os.Link(w.path(fileName), w.path("kept")); err != nil {
		t.Fatal(err)
	}
	seed, _ := readFile(w.path("kept"))
	w.rotate(r)
	body, err := os.ReadFile(w.path("kept"))
	if err != nil || !bytes.Equal(body, make([]byte, len(body))) {
		t.Errorf("the retired key's file still holds %q, %v", body, err)
	}
	for _, name := range strings.Fields(w.files()) {
		body, _ := os.ReadFile(w.path(name))
		if bytes.Contains(body, seed.private.Seed()) || bytes.Contains(body, encode(&file{private: seed.private})[:60]) {
			t.Errorf("%s holds the retired seed", name)
		}
	}
}

// TestNoSeedInTheLedger: neither the database nor a backup holds a private key.
func TestNoSeedInTheLedger(t *testing.T) {
	w := newWorld(t)
	w.start()
	k, err := readFile(w.path(fileName))
	if err != nil {
		t.Fatal(err)
	}
	backup := filepath.Join(t.TempDir(), "b")
	if _, err := ledger.Backup(t.Context(), w.dir, backup); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{w.path("ledger.db"), w.path("ledger.db-wal"), w.path("ledger.anchor"), backup} {
		body, err := os.ReadFile(name)
		if err != nil || bytes.Contains(body, k.private.Seed()) {
			t.Errorf("%s: %v, or it holds the seed", name, err)
		}
	}
}

// look is what is at path, without waiting for a pipe's other end.
func look(path string) string {
	info, err := os.Lstat(path)
	if err != nil || !info.Mode().IsRegular() {
		return fmt.Sprint(info, err)
	}
	body, _ := os.ReadFile(path)
	return info.Mode().String() + string(body)
}

func relink(path string) error {
	if err := os.Rename(path, path+".real"); err != nil {
		return err
	}
	return os.Symlink(path+".real", path)
}

func appendTo(path, s string) error {
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteString(s)
	return err
}

func replace(path, old, to string) error {
	body, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	return os.WriteFile(path, bytes.Replace(body, []byte(old), []byte(to), 1), 0o600)
}
