package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
	"spectrum-os.org/broker/capabilities"
)

const eventLine = "%-7v %-19s %-16s %-12s %-10s %-10s %s"

func (a *app) eventHead() {
	if a.output == "table" {
		_, _ = fmt.Fprintf(a.host.Stdout, eventLine+"\n", "SEQ", "TIME", "TYPE", "ACTOR", "VM", "GRANT", "DETAIL")
	}
}

func (a *app) printEvent(ctx context.Context, e api.Event) error {
	return a.printOne(e, func() string {
		named := strings.HasPrefix(e.Type, "name.")
		if named {
			a.names = nil
		}
		name := func(partition uuid.UUID) string {
			if named {
				return a.idText(&partition) // what it is called is the detail
			}
			return a.partitionName(ctx, partition)
		}
		detail := a.eventDetail(e.Data, name)
		if e.Partition != nil && e.VM == nil && e.Grant == nil {
			detail = strings.TrimSuffix("partition "+name(*e.Partition)+": "+detail, ": ")
		}
		return plain(strings.TrimRight(fmt.Sprintf(eventLine, e.Seq, stamp(e.Time), e.Type, actorText(e.Actor),
			a.idText(e.VM), a.idText(e.Grant), detail), " "))
	})
}

// partitionName is what a partition is called now, or its digits.
func (a *app) partitionName(ctx context.Context, partition uuid.UUID) string {
	if a.full {
		return partition.String()
	}
	if a.names == nil {
		a.names = map[uuid.UUID]string{}
		names, err := a.broker().ListNames(ctx)
		if err == nil {
			for _, n := range names {
				a.names[n.Partition] = n.Name
			}
		}
	}
	return orElse(a.names[partition], a.idText(&partition))
}

func (a *app) idText(id *uuid.UUID) string {
	switch {
	case id == nil:
		return "-"
	case a.full:
		return id.String()
	}
	return id.String()[:8]
}

func actorText(by api.Actor) string {
	switch {
	case by.UID != nil:
		return fmt.Sprintf("uid %d", *by.UID)
	case by.VM != nil:
		return "vm " + by.VM.String()[:8]
	}
	return by.Kind
}

// eventDetail is what people look for first in an event's data, whose shape
// differs by type; all of it is in the JSON.
func (a *app) eventDetail(data json.RawMessage, name func(partition uuid.UUID) string) string {
	var d struct {
		Capability json.RawMessage `json:"capability"`
		Spelling   string          `json:"spelling"`
		Label      string          `json:"label"`
		Name       string          `json:"name"`
		Alias      string          `json:"alias"`
		Reason     string          `json:"reason"`
		Revision   string          `json:"revision"`
		Engine     string          `json:"engine"`
		Instance   string          `json:"instance"`
		Wall       string          `json:"wall"`
		Error      string          `json:"error"`
		Version    string          `json:"version"`
		PID        json.Number     `json:"pid"`
		Epoch      json.Number     `json:"epoch"`
		KID        string          `json:"kid"`
		Archive    string          `json:"archive"`
		Carries    string          `json:"carries"`
		Count      json.Number     `json:"count"`
		Deadline   struct {
			Wall string `json:"wall"`
		} `json:"deadline"`
		Decision struct {
			Outcome string `json:"outcome"`
			Summary string `json:"summary"`
		} `json:"decision"`
	}
	if len(data) == 0 {
		return ""
	}
	if err := json.Unmarshal(data, &d); err != nil {
		return string(data)
	}
	if !a.full && len(d.Revision) > shownRevision {
		d.Revision = d.Revision[:shownRevision]
	}
	if d.Engine == hostEngine {
		d.Engine = "the host"
	} else {
		d.Engine = "" // the event is of its partition
	}
	var parts []string
	for _, p := range []string{
		orElse(d.Spelling, capabilityText(d.Capability, name)), d.Label, d.Name, d.Alias, d.Reason,
		orElse(d.Decision.Summary, d.Decision.Outcome), d.Engine, d.Error, named("revision", d.Revision),
		named("run", d.Instance), named("until", d.Deadline.Wall), d.Wall, named("version", d.Version), named("pid", d.PID.String()), named("epoch", d.Epoch.String()), named("key", d.KID),
		named("archive", d.Archive), strings.TrimSpace(d.Count.String() + " " + d.Carries),
	} {
		if p != "" && !slices.Contains(parts, p) {
			parts = append(parts, p)
		}
	}
	if len(parts) == 0 {
		return string(data)
	}
	return strings.Join(parts, "; ")
}

// named is "what value", or "" where there is no value.
func named(what, value string) string {
	if value == "" {
		return ""
	}
	return what + " " + value
}

// capabilityText spells a capability from its JSON; one of a kind that is not
// known here, as far as its resource goes.
func capabilityText(raw json.RawMessage, name func(partition uuid.UUID) string) string {
	var spelt string
	if json.Unmarshal(raw, &spelt) == nil {
		return spelt
	}
	var c api.Capability
	if json.Unmarshal(raw, &c) != nil || c.Kind == "" {
		return ""
	}
	var file struct {
		Partition uuid.UUID `json:"partition"`
		Path      string    `json:"path"`
	}
	if c.Kind == (capabilities.FS{}).Name() && json.Unmarshal(c.Resource, &file) == nil && file.Path != "" {
		mode := "ro"
		if slices.Contains(c.Rights, capabilities.RightWrite) {
			mode = "rw"
		}
		return fmt.Sprintf("%s:%s:%s:%s", c.Kind, mode, name(file.Partition), file.Path)
	}
	return fmt.Sprintf("%s %s %s", c.Kind, strings.Join(c.Rights, "+"), c.Resource)
}
