package sources

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"

	"github.com/google/uuid"
	"golang.org/x/sys/unix"
)

// MaxPartitions is how many partitions are looked at.
const MaxPartitions = 256

const definitionsDir = "svc/data"

// Scan finds what is there. It fails only when one of the two directories of
// the host's own cannot be read; whatever is wrong beneath them is a Problem.
func Scan(ctx context.Context, o Options) (*Inventory, error) {
	log := o.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	inv := &Inventory{}
	if o.Builtin != "" {
		dir, err := openTree(o.Builtin, 0)
		if err != nil {
			return nil, fmt.Errorf("cannot read the built-in definitions: %w", err)
		}
		s := source{dir: o.Builtin, writable: writable(dir), opts: o, log: log}
		inv.Definitions, inv.Problems = s.scan(dir)
		dir.close()
	}
	if o.Partitions != "" {
		if err := inv.scanPartitions(ctx, o, log); err != nil {
			return nil, err
		}
	}
	inv.refuseDuplicates(o.BoundTo)
	return inv, nil
}

func (inv *Inventory) scanPartitions(ctx context.Context, o Options, log *slog.Logger) error {
	dir, err := openTree(o.Partitions, 0)
	if err != nil {
		return fmt.Errorf("cannot read the directory of partitions: %w", err)
	}
	defer dir.close()
	names, err := dir.names(MaxPartitions)
	if err != nil {
		return fmt.Errorf("cannot read the directory of partitions: %w", err)
	}
	slices.Sort(names)
	for _, name := range names {
		if err := ctx.Err(); err != nil {
			return err
		}
		if strings.HasPrefix(name, ".") {
			continue
		}
		id, err := uuid.Parse(name)
		if err != nil || id.String() != name || id == uuid.Nil {
			inv.Problems = append(inv.Problems, Problem{
				File:   HostPath(fmt.Sprintf("%s/%s", o.Partitions, shown(name))),
				Reason: "a partition's directory is named by its UUID in lower case; ignored",
			})
			continue
		}
		inv.scanPartition(id, o, log)
	}
	return nil
}

func (inv *Inventory) scanPartition(id uuid.UUID, o Options, log *slog.Logger) {
	p := Partition{ID: id, Dir: o.Partitions.Join(id.String())}
	refuse := func(file HostPath, err error) {
		inv.Problems = append(inv.Problems, Problem{Partition: id, File: file, Reason: err.Error()})
	}
	root, err := openTree(p.Dir, beneathFlags)
	if err != nil {
		refuse(p.Dir, err)
		return
	}
	defer root.close()
	p.Writable = writable(root)
	if p.OwnerUID, p.OwnerGID, err = owner(root); err != nil {
		refuse(p.Dir, err)
		return
	}
	inv.Partitions = append(inv.Partitions, p)

	data, err := root.sub(definitionsDir)
	if errors.Is(err, ErrNotFound) {
		return
	}
	if err != nil {
		refuse(p.Dir.Join(definitionsDir), err)
		return
	}
	defer data.close()
	s := source{partition: id, dir: p.Dir.Join(definitionsDir), writable: p.Writable, opts: o, log: log}
	defs, problems := s.scan(data)
	inv.Definitions = append(inv.Definitions, defs...)
	inv.Problems = append(inv.Problems, problems...)
}

// owner is that of files/; where there is none, nothing is shared, and it is
// the root's.
func owner(root tree) (uid, gid uint32, err error) {
	f, st, err := root.path(filesDir)
	if errors.Is(err, ErrNotFound) {
		f, st, err = root.path(".")
	}
	if err != nil {
		return 0, 0, err
	}
	_ = f.Close()
	if st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return 0, 0, fmt.Errorf("%s %w", filesDir, ErrNotDirectory)
	}
	return st.Uid, st.Gid, nil
}

func writable(t tree) bool {
	var st unix.Statfs_t
	return unix.Fstatfs(int(t.dir.Fd()), &st) == nil && st.Flags&unix.ST_RDONLY == 0
}

// refuseDuplicates refuses definitions with a UUID that is not theirs alone.
// One that the UUID is bound to keeps it: a partition that is plugged in must
// not be able to put another's VM out of service.
func (inv *Inventory) refuseDuplicates(bound func(uuid.UUID) (uuid.UUID, bool)) {
	slices.SortStableFunc(inv.Definitions, func(a, b Definition) int {
		return cmp.Or(slices.Compare(a.Partition[:], b.Partition[:]), strings.Compare(a.Alias, b.Alias))
	})
	same := map[uuid.UUID][]Definition{}
	for _, d := range inv.Definitions {
		same[d.ID] = append(same[d.ID], d)
	}
	var kept []Definition
	for _, d := range inv.Definitions {
		if reason := refusal(d, same[d.ID], bound); reason != "" {
			inv.Problems = append(inv.Problems, Problem{
				Partition: d.Partition, Definition: d.Alias, File: d.Dir.Join(uuidFile), Reason: reason,
			})
			continue
		}
		kept = append(kept, d)
	}
	inv.Definitions = kept
}

func refusal(d Definition, same []Definition, bound func(uuid.UUID) (uuid.UUID, bool)) string {
	var owner uuid.UUID
	known := false
	if bound != nil {
		owner, known = bound(d.ID)
	}
	if known && owner != d.Partition {
		return fmt.Sprintf("the UUID %s of %s belongs to a VM of %s", d.ID, d.spelt(), home(owner))
	}
	var others []string
	for _, o := range same {
		if o.Dir != d.Dir && (!known || o.Partition == owner) {
			others = append(others, o.spelt())
		}
	}
	if len(others) == 0 {
		return ""
	}
	return fmt.Sprintf("%s and %s have the same UUID %s", d.spelt(), strings.Join(others, ", "), d.ID)
}

// spelt names a definition as people do, with its partition's UUID.
func (d Definition) spelt() string {
	if d.BuiltIn() {
		return "builtin/" + d.Alias
	}
	return d.Partition.String() + "/" + d.Alias
}

func home(partition uuid.UUID) string {
	if partition == uuid.Nil {
		return "the built-in definitions"
	}
	return "partition " + partition.String()
}
