package cli

import (
	"context"
	"fmt"
	"io"

	"github.com/google/uuid"

	"spectrum-os.org/broker/broker/api"
)

// whys tells of each grant how it came to be.
func (a *app) whys(ctx context.Context, grants []api.Grant) ([]api.Why, error) {
	out := make([]api.Why, 0, len(grants))
	for _, g := range grants {
		why, err := a.broker().Why(ctx, g.ID.String())
		if err != nil {
			return nil, err
		}
		out = append(out, why)
	}
	return out, nil
}

// printWhys prints chains of steps, each grant's own.
func (a *app) printWhys(ctx context.Context, grants []api.Grant) error {
	whys, err := a.whys(ctx, grants)
	if err != nil {
		return err
	}
	return a.print(map[string][]api.Why{"grants": whys}, func(w io.Writer) {
		for i, why := range whys {
			if i > 0 {
				_, _ = fmt.Fprintln(w)
			}
			a.writeWhy(w, why)
		}
	})
}

// printWhy prints one grant's chain.
func (a *app) printWhy(ctx context.Context, ref string) error {
	why, err := a.broker().Why(ctx, ref)
	if err != nil {
		return err
	}
	return a.print(why, func(w io.Writer) { a.writeWhy(w, why) })
}

func (a *app) writeWhy(w io.Writer, why api.Why) {
	put := func(format string, args ...any) { _, _ = fmt.Fprintln(w, plain(fmt.Sprintf(format, args...))) }
	ids := make([]uuid.UUID, len(why.Steps))
	for i, step := range why.Steps {
		ids[i] = step.Grant.ID
	}
	short := a.short(ids)
	for i, step := range why.Steps {
		g := step.Grant
		head := fmt.Sprintf("%s %s, held by %s, %s", short(g.ID), orElse(g.Spoken, g.Spelling), orElse(g.HolderName, g.Holder.String()), g.State)
		if i > 0 {
			head = "derived from " + head
		}
		put("%s", head)
		done := map[string]string{"grant": "granted", "delegate": "delegated", "request": "requested"}[step.Action]
		put("  %s by %s at %s, event %d", orElse(done, step.Action), actorWords(step), stamp(g.Created), step.Seq)
		if !step.Live && step.Dead != "" {
			put("  not in force: %s", step.Dead)
		}
		if d := g.Decision; d != nil {
			put("  %s", orElse(d.Summary, string(d.Outcome)))
			for _, line := range verdictLines(*d) {
				put("    %s", line)
			}
		}
	}
}

// actorWords are who caused a step.
func actorWords(step api.WhyStep) string {
	switch actor := step.Actor; {
	case actor.Kind == "person" && actor.UID != nil:
		return fmt.Sprintf("the person with uid %d", *actor.UID)
	case actor.Kind == "vm" && step.ActorName != "":
		return "VM " + step.ActorName
	case actor.VM != nil && actor.Kind == "definition":
		return "the definition of VM " + actor.VM.String()
	case actor.VM != nil:
		return "VM " + actor.VM.String()
	default:
		return "the " + actor.Kind
	}
}

// usesText is how much of a budget is used: "2 of 5", or "" where nothing is
// counted.
func usesText(g api.Grant) string {
	if g.MaxUses == nil {
		return ""
	}
	return fmt.Sprintf("%d of %d", g.Uses, *g.MaxUses)
}

// wouldRevoke prints what a dry run found, as the tree that would fall.
func (a *app) wouldRevoke(res api.RevokeResult) error {
	return a.print(res, func(w io.Writer) {
		if len(res.WouldRevoke) == 0 {
			_, _ = fmt.Fprintln(w, "there is nothing to revoke")
			return
		}
		a.grantTable(w, res.WouldRevoke, true)
		_, _ = fmt.Fprintf(w, "%d would be revoked; nothing was changed\n", len(res.WouldRevoke))
	})
}
