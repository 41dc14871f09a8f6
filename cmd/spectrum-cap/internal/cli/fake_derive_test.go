package cli_test

import (
	"context"
	"slices"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
)

// fall is what would end with roots, each once and after what it derives from.
func (f *fake) fall(roots []*api.Grant) []api.Grant {
	var out []api.Grant
	seen := map[uuid.UUID]bool{}
	for len(roots) > 0 {
		g := roots[0]
		roots = roots[1:]
		if seen[g.ID] || g.State == api.GrantRevoked {
			continue
		}
		seen[g.ID] = true
		out = append(out, *g)
		var below []*api.Grant
		for _, child := range f.grants {
			if child.Parent != nil && *child.Parent == g.ID {
				below = append(below, child)
			}
		}
		roots = slices.Concat(below, roots)
	}
	return out
}

func (f *fake) Why(_ context.Context, ref string) (out api.Why, err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	g, err := f.grant(ref)
	if err != nil {
		return out, err
	}
	uid := uint32(1000)
	for g != nil {
		step := api.WhyStep{Grant: *g, Action: "grant", Actor: api.Actor{Kind: "person", UID: &uid}, Seq: 7, Live: g.State == api.GrantActive}
		if !step.Live {
			step.Dead = "grant " + g.ID.String() + ": " + string(g.State)
		}
		parent := g.Parent
		g = nil
		if parent != nil {
			if g, err = f.grant(parent.String()); err != nil {
				return out, err
			}
			if g.Holder != step.Grant.Holder {
				step.Action, step.Actor, step.ActorName = "delegate", api.Actor{Kind: "vm", VM: &g.Holder}, g.HolderName
			}
		}
		out.Steps = append(out.Steps, step)
	}
	return out, nil
}
