package broker

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestKeyIsMadeOnceAndOnlyForItsOwner(t *testing.T) {
	dir := t.TempDir()
	first, err := loadKey(dir)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "signing-key.pem")
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v; want 0600", info.Mode(), err)
	}
	again, err := loadKey(dir)
	if err != nil || !bytes.Equal(first, again) {
		t.Errorf("the second load gives another key, or %v", err)
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 1 {
		t.Errorf("%d files, want the key alone", len(entries))
	}
}

func TestKeyIsRefused(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(path string) error
		says  string
	}{
		"readable by others": {func(p string) error { return os.Chmod(p, 0o640) }, "chmod 600"},
		"a link":             {func(p string) error { return relink(p) }, "too many levels of symbolic links"},
		"cut short":          {func(p string) error { return os.Truncate(p, 40) }, "damaged"},
		"empty":              {func(p string) error { return os.Truncate(p, 0) }, "damaged"},
		"with more after it": {func(p string) error { return appendTo(p, "more") }, "damaged"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if _, err := loadKey(dir); err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(dir, "signing-key.pem")
			if err := c.spoil(path); err != nil {
				t.Fatal(err)
			}
			before, _ := os.ReadFile(path)
			_, err := loadKey(dir)
			if err == nil || !strings.Contains(err.Error(), c.says) {
				t.Errorf("got %v, want %q", err, c.says)
			}
			if after, _ := os.ReadFile(path); !bytes.Equal(before, after) {
				t.Error("the refused key was changed")
			}
		})
	}
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
