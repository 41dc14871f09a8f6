package sources

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"regexp"
	"slices"
	"strings"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
)

// Bounds of a source.
const (
	MaxDefinitions = 256 // of one partition, or built in
	MaxCmdline     = 2047
	MaxDisks       = 16

	maxEntries = 1024 // of a directory that is read
)

// aliasForm is that of a definition's directory. It stands in paths, on
// terminals and behind a "/" in the spelling of a VM.
var aliasForm = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)

// A source is where definitions come from.
type source struct {
	partition uuid.UUID // zero: built-in
	dir       HostPath  // of the definitions
	writable  bool
	opts      Options
	log       *slog.Logger
}

// fileError is an error about one file of a definition.
type fileError struct {
	name string
	err  error
}

func (e *fileError) Error() string { return e.err.Error() }
func (e *fileError) Unwrap() error { return e.err }

// scan loads the definitions in dir, sorted by alias.
func (s source) scan(dir tree) (defs []Definition, problems []Problem) {
	names, err := dir.names(maxEntries)
	if err != nil {
		return nil, []Problem{s.problem("", s.dir, err)}
	}
	slices.Sort(names)
	var aliases []string
	for _, name := range names {
		if strings.HasPrefix(name, ".") {
			continue
		}
		if !aliasForm.MatchString(name) {
			problems = append(problems, s.problem("", HostPath(fmt.Sprintf("%s/%s", s.dir, shown(name))),
				fmt.Errorf("the name of a definition has the form %s", aliasForm)))
			continue
		}
		aliases = append(aliases, name)
	}
	if len(aliases) > MaxDefinitions {
		// Which of them to take would be chance.
		return nil, append(problems, s.problem("", s.dir, fmt.Errorf("%w: at most %d definitions, and there are %d; none is used", ErrTooMany, MaxDefinitions, len(aliases))))
	}
	for _, alias := range aliases {
		d, err := s.load(dir, alias)
		if err != nil {
			file := s.dir.Join(alias)
			var about *fileError
			if errors.As(err, &about) {
				file = file.Join(about.name)
			}
			problems = append(problems, s.problem(alias, file, err))
			continue
		}
		defs = append(defs, d)
	}
	return defs, problems
}

func (s source) problem(alias string, file HostPath, err error) Problem {
	p := Problem{Partition: s.partition, Definition: alias, File: file}
	var at *lineError
	if errors.As(err, &at) {
		p.Line, err = at.line, at.err
	}
	p.Reason = err.Error()
	return p
}

// load reads one definition.
func (s source) load(dir tree, alias string) (Definition, error) {
	d := Definition{Partition: s.partition, Alias: alias, Aliases: []string{alias}, Dir: s.dir.Join(alias)}
	def, err := dir.sub(alias)
	if err != nil {
		return d, err
	}
	defer def.close()

	src, err := def.read("vm.toml", MaxVMToml)
	if err != nil && !errors.Is(err, ErrNotFound) {
		return d, &fileError{"vm.toml", err}
	}
	c, err := decodeVMToml(src)
	if err != nil {
		return d, &fileError{"vm.toml", err}
	}
	d.MemoryMiB, d.VCPUs, d.Role, d.Labels, d.Template, d.Grants = c.MemoryMiB, c.VCPUs, c.Role, c.Labels, c.Template, c.Grants
	switch {
	case d.Role == RoleApp:
	case d.Role != RoleNet && d.Role != RoleUSB:
		return d, &fileError{"vm.toml", fmt.Errorf("role %s is unknown; known are app, net, usb", d.Role)}
	case !d.BuiltIn():
		return d, &fileError{"vm.toml", fmt.Errorf("role %s is for built-in definitions only", d.Role)}
	}
	if d.Cmdline, err = readCmdline(def); err != nil {
		return d, &fileError{"cmdline", err}
	}
	if err := checkBoot(def); err != nil {
		return d, err
	}
	// Last, so that what is wrong otherwise is given no identity.
	if d.ID, d.Unwritten, err = s.identify(def, alias); err != nil {
		return d, &fileError{uuidFile, err}
	}
	return d, nil
}

func readCmdline(def tree) (string, error) {
	b, err := def.read("cmdline", MaxCmdline+1)
	if errors.Is(err, ErrNotFound) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	line := strings.TrimSuffix(string(b), "\n")
	if len(line) > MaxCmdline || !printable(line) {
		return "", fmt.Errorf("cmdline %w: it must be one line of at most %d bytes without control characters", ErrContents, MaxCmdline)
	}
	return line, nil
}

// checkBoot looks at what the definition would start from and opens nothing.
func checkBoot(def tree) error {
	check := func(name string, optional bool) error {
		f, st, err := def.path(name)
		if optional && errors.Is(err, ErrNotFound) {
			return nil
		}
		if err == nil {
			_ = f.Close()
			if st.Mode&unix.S_IFMT == unix.S_IFREG {
				return nil
			}
			err = fmt.Errorf("%s is %s, not a regular file", name, typeName(st.Mode))
		}
		return &fileError{name, err}
	}
	if err := check("vmlinux", false); err != nil {
		return err
	}
	if err := check("initrd", true); err != nil {
		return err
	}
	disks, err := diskNames(def)
	if err != nil {
		return &fileError{"blk", err}
	}
	for _, name := range disks {
		if err := check("blk/"+name, false); err != nil {
			return err
		}
	}
	return nil
}

// diskNames are the images in blk/, sorted.
func diskNames(def tree) ([]string, error) {
	blk, err := def.sub("blk")
	if errors.Is(err, ErrNotFound) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer blk.close()
	names, err := blk.names(maxEntries)
	if err != nil {
		return nil, err
	}
	names = slices.DeleteFunc(names, func(n string) bool { return strings.HasPrefix(n, ".") || !strings.HasSuffix(n, ".img") })
	for _, n := range names {
		if !printable(n) {
			return nil, fmt.Errorf("blk/%s %w: its name has control characters", shown(n), ErrContents)
		}
	}
	if len(names) > MaxDisks {
		return nil, fmt.Errorf("blk %w: at most %d images", ErrTooMany, MaxDisks)
	}
	slices.Sort(names)
	return names, nil
}

// identify is the definition's UUID: that in its uuid file, else what the
// ledger knows, else a new one; written beside the definition where that can
// be done.
func (s source) identify(def tree, alias string) (id uuid.UUID, unwritten bool, err error) {
	id, err = readUUID(def)
	if err == nil || !errors.Is(err, ErrNotFound) {
		return id, false, err
	}
	known := false
	if s.opts.KnownIDs != nil {
		id, known = s.opts.KnownIDs(s.partition, alias)
	}
	if !known {
		if id, err = uuid.NewRandom(); err != nil {
			return uuid.Nil, false, err
		}
	}
	if !s.writable {
		return id, true, nil
	}
	switch err := writeUUID(def, id); {
	case err == nil:
		s.log.Info("gave a definition its UUID", "partition", s.partition, "alias", alias, "vm", id)
		return id, false, nil
	case errors.Is(err, fs.ErrExist):
		// Someone wrote one meanwhile.
		id, err = readUUID(def)
		return id, false, err
	default:
		s.log.Warn("cannot write a definition's UUID, the ledger keeps it", "partition", s.partition, "alias", alias, "vm", id, "error", err)
		return id, true, nil
	}
}
