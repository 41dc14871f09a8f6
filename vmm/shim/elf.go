package shim

import (
	"bufio"
	"debug/elf"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
)

// neededFile is a file that the loader wants.
type neededFile struct {
	host   string // absolute path on the host
	inside string // path relative to virtiofsd's root
}

// maxLibraries bounds the walk over what libraries need in turn.
const maxLibraries = 64

// dynamicFiles lists what a program loads: its interpreter, at the path that
// the program names, and all libraries, in one directory. A static program
// loads nothing.
func dynamicFiles(bin *os.File) ([]neededFile, error) {
	f, err := elf.NewFile(bin)
	if err != nil {
		return nil, err
	}
	interp, err := interpreter(f)
	if interp == "" || err != nil {
		return nil, err
	}
	files := []neededFile{{host: interp, inside: strings.TrimPrefix(filepath.Clean(interp), "/")}}
	s := search{class: f.Class, machine: f.Machine, dirs: libraryDirs(), seen: map[string]bool{filepath.Base(interp): true}}
	origin, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", bin.Fd()))
	if err != nil {
		return nil, err
	}
	if err := s.walk(f, filepath.Dir(origin)); err != nil {
		return nil, err
	}
	return append(files, s.found...), nil
}

func interpreter(f *elf.File) (string, error) {
	for _, p := range f.Progs {
		if p.Type != elf.PT_INTERP {
			continue
		}
		b, err := io.ReadAll(io.LimitReader(p.Open(), 4096))
		if err != nil {
			return "", err
		}
		path := strings.TrimRight(string(b), "\x00")
		if !filepath.IsAbs(path) {
			return "", fmt.Errorf("interpreter %q is not an absolute path", path)
		}
		return path, nil
	}
	return "", nil
}

type search struct {
	class   elf.Class
	machine elf.Machine
	dirs    []string
	seen    map[string]bool
	found   []neededFile
}

// walk finds the libraries of f, which lies in origin, and theirs.
func (s *search) walk(f *elf.File, origin string) error {
	names, err := f.ImportedLibraries()
	if err != nil {
		return err
	}
	var dirs []string
	for _, tag := range []elf.DynTag{elf.DT_RUNPATH, elf.DT_RPATH} {
		paths, err := f.DynString(tag)
		if err != nil {
			return err
		}
		for _, path := range paths {
			for dir := range strings.SplitSeq(path, ":") {
				dir = strings.NewReplacer("$ORIGIN", origin, "${ORIGIN}", origin).Replace(dir)
				if filepath.IsAbs(dir) {
					dirs = append(dirs, dir)
				}
			}
		}
	}
	dirs = append(dirs, s.dirs...)
	for _, name := range names {
		if s.seen[name] {
			continue
		}
		s.seen[name] = true
		if len(s.seen) > maxLibraries {
			return fmt.Errorf("more than %d libraries", maxLibraries)
		}
		if err := s.find(name, dirs); err != nil {
			return err
		}
	}
	return nil
}

func (s *search) find(name string, dirs []string) error {
	if name != filepath.Base(name) {
		return fmt.Errorf("library %q is not a plain name", name)
	}
	for _, dir := range dirs {
		path := filepath.Join(dir, name)
		f, err := elf.Open(path)
		if err != nil {
			continue
		}
		if f.Class != s.class || f.Machine != s.machine {
			_ = f.Close()
			continue
		}
		s.found = append(s.found, neededFile{host: path, inside: filepath.Join(libAt, name)})
		err = s.walk(f, dir)
		_ = f.Close()
		return err
	}
	return fmt.Errorf("library %s is not found", name)
}

// libraryDirs are the loader's directories: those of ld.so.conf, then the
// built-in ones.
func libraryDirs() []string {
	dirs := confDirs("/etc/ld.so.conf", 0)
	for _, base := range []string{"/lib", "/usr/lib"} {
		multi, _ := filepath.Glob(base + "/*-linux-gnu")
		dirs = append(dirs, multi...)
		dirs = append(dirs, base+"64", base)
	}
	return dirs
}

func confDirs(path string, depth int) []string {
	f, err := os.Open(path)
	if err != nil || depth > 4 {
		return nil
	}
	defer f.Close()
	var dirs []string
	for lines := bufio.NewScanner(f); lines.Scan(); {
		line, _, _ := strings.Cut(lines.Text(), "#")
		line = strings.TrimSpace(line)
		if pattern, ok := strings.CutPrefix(line, "include "); ok {
			matches, _ := filepath.Glob(strings.TrimSpace(pattern))
			for _, m := range matches {
				dirs = append(dirs, confDirs(m, depth+1)...)
			}
		} else if filepath.IsAbs(line) {
			dirs = append(dirs, line)
		}
	}
	return dirs
}
