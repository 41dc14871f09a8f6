package shim

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// cgroup is the VM's own cgroup, in the unified hierarchy, beneath that of
// the broker. Its two leaves keep the shim apart from its children, so that
// the shim can kill all of them with one write and live.
type cgroup struct{ path string }

const (
	cgroupShim     = "shim"
	cgroupChildren = "children"
)

var errNoCgroup = errors.New("no unified cgroup hierarchy is mounted")

// unifiedRoot finds the hierarchy alone or beside version 1.
func unifiedRoot() (string, error) {
	for _, dir := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		var st unix.Statfs_t
		if unix.Statfs(dir, &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC {
			return dir, nil
		}
	}
	return "", errNoCgroup
}

func ownCgroup() (string, error) {
	root, err := unifiedRoot()
	if err != nil {
		return "", err
	}
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(b)) {
		if path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
			return filepath.Join(root, path), nil
		}
	}
	return "", errNoCgroup
}

// createCgroup makes the cgroup and notes its path in the runtime directory,
// first and whole, so that it can always be found again: a note that breaks off
// could not be told from one of somebody else's.
func createCgroup(runtimeDir, vm string) (*cgroup, error) {
	own, err := ownCgroup()
	if err != nil {
		return nil, err
	}
	c := &cgroup{path: filepath.Join(own, "spectrum-vm-"+vm)}
	if err := replaceFile(runtimeDir, cgroupName, []byte(c.path)); err != nil {
		return nil, err
	}
	for _, leaf := range []string{cgroupShim, cgroupChildren} {
		if err := os.MkdirAll(filepath.Join(c.path, leaf), 0o755); err != nil {
			return nil, errors.Join(err, removeCgroup(runtimeDir), os.Remove(filepath.Join(runtimeDir, cgroupName)))
		}
	}
	return c, nil
}

// noted is the cgroup that createCgroup made, or nil.
func noted(runtimeDir string) (*cgroup, error) {
	b, err := os.ReadFile(filepath.Join(runtimeDir, cgroupName))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	root, err := unifiedRoot()
	if err != nil {
		return nil, nil
	}
	path := string(bytes.TrimSpace(b))
	if filepath.Clean(path) != path || !strings.HasPrefix(path, root+"/") || !strings.HasPrefix(filepath.Base(path), "spectrum-vm-") {
		return nil, fmt.Errorf("%s does not name a cgroup of ours", cgroupName)
	}
	return &cgroup{path: path}, nil
}

func (c *cgroup) open(leaf string) (*os.File, error) {
	return os.OpenFile(filepath.Join(c.path, leaf), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
}

// kill ends every process in a leaf.
func (c *cgroup) kill(leaf string) error {
	err := os.WriteFile(filepath.Join(c.path, leaf, "cgroup.kill"), []byte("1"), 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// renew ends every process in a leaf and opens an empty one in its place. A
// leaf that was killed is not used again: some kernels then kill whatever is
// cloned into it.
func (c *cgroup) renew(leaf string) (*os.File, error) {
	if err := c.kill(leaf); err != nil {
		return nil, err
	}
	if err := c.removeLeaf(leaf); err != nil {
		return nil, err
	}
	if err := os.Mkdir(filepath.Join(c.path, leaf), 0o755); err != nil {
		return nil, err
	}
	return c.open(leaf)
}

// removeLeaf waits a moment: a killed process leaves its cgroup late.
func (c *cgroup) removeLeaf(leaf string) error {
	for end := time.Now().Add(reapTimeout); ; time.Sleep(2 * time.Millisecond) {
		err := unix.Rmdir(filepath.Join(c.path, leaf))
		if err == nil || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(end) {
			return fmt.Errorf("cannot remove cgroup %s: %w", filepath.Join(c.path, leaf), err)
		}
	}
}

// removeCgroup kills what is left in the cgroup and removes it.
func removeCgroup(runtimeDir string) error {
	c, err := noted(runtimeDir)
	if c == nil || err != nil {
		return err
	}
	for _, leaf := range []string{cgroupShim, cgroupChildren, ""} {
		if leaf != "" {
			_ = c.kill(leaf)
		}
		if err := c.removeLeaf(leaf); err != nil {
			return err
		}
	}
	return nil
}

// leave is removeCgroup by the shim itself, which moves up out of its leaf.
func (c *cgroup) leave(runtimeDir string) error {
	if err := os.WriteFile(filepath.Join(filepath.Dir(c.path), "cgroup.procs"), []byte("0"), 0); err != nil {
		return err
	}
	return removeCgroup(runtimeDir)
}
