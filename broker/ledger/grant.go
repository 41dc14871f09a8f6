package ledger

import (
	"encoding/json"
	"slices"
	"time"

	"github.com/google/uuid"
	"spectrum-os.org/broker/capabilities"
)

// Grant is a copy of what the ledger knows about one grant.
type Grant struct {
	ID              uuid.UUID
	Holder          uuid.UUID
	HolderPartition uuid.UUID
	Instance        string // the holder's instance it is tied to
	Parent          uuid.UUID
	Depth           int // 0: derived from nothing
	Capability      capabilities.Capability
	Label           string
	State           GrantState
	Generation      uint64 // rises whenever what should exist changes
	// Changed is the event that last changed what should exist. Other than
	// Generation it is ordered across grants, and rises when any of them changes.
	Changed  uint64
	Created  time.Time
	Deadline capabilities.Deadline
	Renewed  time.Time // when its deadline was last moved; zero: never
	Limits   Limits
	Uses     int // charged to it, by itself and by all that derives from it
	Persist  bool
	Declared bool
	Actor    Actor
	Decision json.RawMessage
	Reason   string // of its last move that gave one
	Troubled string // why what it stands for cannot be made or taken away just now
	Degraded string
	Seq      uint64 // its grant.requested event
}

// ResourcePartition is the partition that the granted resource belongs to, if
// it belongs to one.
func (g Grant) ResourcePartition() (uuid.UUID, bool) {
	if g.Capability.Resource == nil {
		return uuid.Nil, false
	}
	return g.Capability.Resource.Partition()
}

// Filter selects grants; a zero field selects all.
type Filter struct {
	Holder            uuid.UUID
	HolderPartition   uuid.UUID
	ResourcePartition uuid.UUID
	Parent            uuid.UUID
	Instance          string
	States            []GrantState
}

func (f Filter) state(s GrantState) bool {
	return len(f.States) == 0 || slices.Contains(f.States, s)
}
