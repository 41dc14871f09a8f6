package guest

import (
	"bufio"
	"fmt"
	"io"
	"path"
	"sort"
	"strings"
)

// File types and permissions as the newc format and stat(2) have them.
const (
	modeDir  = 0o040000
	modeFile = 0o100000
	modeLink = 0o120000
	modeChar = 0o020000
)

// entry is one file of an archive. Owner is always root, times are zero.
type entry struct {
	mode         uint32
	major, minor uint32
	data         []byte
}

// tree is an archive being put together, by path without a leading slash.
type tree map[string]entry

func (t tree) dir(name string, perm uint32) { t.add(name, entry{mode: modeDir | perm}) }
func (t tree) file(name string, perm uint32, b []byte) {
	t.add(name, entry{mode: modeFile | perm, data: b})
}

func (t tree) link(name, target string) {
	t.add(name, entry{mode: modeLink | 0o777, data: []byte(target)})
}

// add puts e at name and makes the directories above it.
func (t tree) add(name string, e entry) {
	name = strings.Trim(path.Clean("/"+name), "/")
	for up := path.Dir(name); up != "."; up = path.Dir(up) {
		if _, ok := t[up]; !ok {
			t[up] = entry{mode: modeDir | 0o755}
		}
	}
	t[name] = e
}

// write emits t as a newc cpio archive (Linux, Documentation/driver-api/
// early-userspace/buffer-format.rst), sorted, so parents come first.
func (t tree) write(w io.Writer) error {
	names := make([]string, 0, len(t))
	for name := range t {
		names = append(names, name)
	}
	sort.Strings(names)
	out := &padded{w: bufio.NewWriterSize(w, 1<<20)}
	for i, name := range names {
		out.entry(uint32(i+1), name, t[name])
	}
	out.entry(0, "TRAILER!!!", entry{})
	if out.err != nil {
		return out.err
	}
	return out.w.Flush()
}

// padded counts what it wrote, as names and data are padded to 4 bytes.
type padded struct {
	w   *bufio.Writer
	n   int
	err error
}

func (p *padded) put(b []byte) {
	if p.err != nil {
		return
	}
	_, p.err = p.w.Write(b)
	p.n += len(b)
}

func (p *padded) pad() { p.put(make([]byte, (4-p.n%4)%4)) }

func (p *padded) entry(ino uint32, name string, e entry) {
	links := uint32(1)
	if e.mode&0o170000 == modeDir {
		links = 2
	}
	p.put(fmt.Appendf(nil, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X",
		ino, e.mode, 0, 0, links, 0, len(e.data), 0, 0, e.major, e.minor, len(name)+1, 0))
	p.put(append([]byte(name), 0))
	p.pad()
	p.put(e.data)
	p.pad()
}
