package guest

import (
	"bytes"
	"context"
	"debug/elf"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// modules reads kernel modules of one kernel's tree and orders them.
type modules struct {
	files   map[string]string // module name -> path
	builtin map[string]bool
}

// openModules indexes dir, a lib/modules/<release> directory.
func openModules(dir string) (*modules, error) {
	m := &modules{files: map[string]string{}, builtin: map[string]bool{}}
	list, err := os.ReadFile(filepath.Join(dir, "modules.builtin"))
	if err != nil {
		return nil, fmt.Errorf("cannot read what is built into the kernel: %w", err)
	}
	for line := range strings.Lines(string(list)) {
		m.builtin[moduleName(strings.TrimSpace(line))] = true
	}
	err = filepath.WalkDir(filepath.Join(dir, "kernel"), func(p string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && strings.Contains(filepath.Base(p), ".ko") {
			m.files[moduleName(p)] = p
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("cannot list kernel modules: %w", err)
	}
	return m, nil
}

// moduleName is the name a module is known by: its file's, with '_' for '-'.
func moduleName(p string) string {
	name, _, _ := strings.Cut(filepath.Base(p), ".ko")
	return strings.ReplaceAll(name, "-", "_")
}

// module is one to load: its bytes, not compressed.
type module struct {
	name string
	data []byte
}

// load returns the wanted modules, each after the ones it depends on, less
// those built into the kernel and those in have, to which it adds.
func (m *modules) load(ctx context.Context, wanted []string, have map[string]bool) ([]module, error) {
	var out []module
	for _, name := range wanted {
		if have[name] || m.builtin[name] {
			continue
		}
		have[name] = true
		file, ok := m.files[name]
		if !ok {
			return nil, fmt.Errorf("the kernel has no module %s", name)
		}
		data, err := readModule(ctx, file)
		if err != nil {
			return nil, fmt.Errorf("cannot read module %s: %w", name, err)
		}
		needs, err := moduleDepends(data)
		if err != nil {
			return nil, fmt.Errorf("cannot read what module %s needs: %w", name, err)
		}
		before, err := m.load(ctx, needs, have)
		if err != nil {
			return nil, err
		}
		out = append(append(out, before...), module{name: name, data: data})
	}
	return out, nil
}

// readModule decompresses with the distribution's own tool, as Debian's
// later kernels ship .ko.xz.
func readModule(ctx context.Context, file string) ([]byte, error) {
	switch filepath.Ext(file) {
	case ".ko":
		return os.ReadFile(file)
	case ".xz":
		return exec.CommandContext(ctx, "xz", "-dc", file).Output()
	case ".zst":
		return exec.CommandContext(ctx, "zstd", "-qdc", file).Output()
	}
	return nil, errors.New("unknown compression")
}

func moduleDepends(data []byte) ([]string, error) {
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	section := f.Section(".modinfo")
	if section == nil {
		return nil, errors.New("it has no .modinfo")
	}
	info, err := section.Data()
	if err != nil {
		return nil, err
	}
	var needs []string
	for field := range bytes.SplitSeq(info, []byte{0}) {
		if list, ok := bytes.CutPrefix(field, []byte("depends=")); ok && len(list) > 0 {
			for name := range strings.SplitSeq(string(list), ",") {
				needs = append(needs, moduleName(name))
			}
		}
	}
	return needs, nil
}
