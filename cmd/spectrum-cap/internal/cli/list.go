package cli

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/google/uuid"
	"github.com/spf13/cobra"

	"spectrum-os.org/broker/broker/api"
)

func (a *app) listCommand() *cobra.Command {
	var (
		filter api.GrantFilter
		states []string
		holder string
		tree   bool
		why    bool
	)
	cmd := &cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   "List grants, as a table or as the tree of what derives from what",
		Example: `  spectrum-cap list
  spectrum-cap list --tree
  spectrum-cap list --all --holder work/mail
  spectrum-cap list --holder work/web --why
  spectrum-cap list --resource fs:ro:work:/invoices -o json`,
		Args: args(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if holder != "" && filter.VM != "" {
				return usage("--holder and --vm are the same; give one")
			}
			filter.VM += holder
			if tree && why {
				return usage("--tree and --why exclude each other")
			}
			for _, s := range states {
				filter.State = append(filter.State, api.GrantState(s))
			}
			grants, err := a.broker().ListGrants(cmd.Context(), filter)
			if err != nil {
				return err
			}
			if why {
				return a.printWhys(cmd.Context(), grants)
			}
			return a.print(api.GrantList{Grants: grants}, func(w io.Writer) { a.grantTable(w, grants, tree) })
		},
	}
	f := cmd.Flags()
	f.BoolVar(&tree, "tree", false, "show derived grants beneath what they derive from")
	f.BoolVar(&filter.All, "all", false, "also those that have ended")
	f.BoolVar(&why, "why", false, "show how each came to be: what it derives from, and the decisions that allowed that")
	f.StringVar(&holder, "holder", "", "only what this `VM` holds")
	f.StringVar(&filter.VM, "vm", "", "the same as --holder `VM`")
	f.StringVar(&filter.Resource, "resource", "", "only what reaches into this `capability`'s resource")
	f.StringVar(&filter.Partition, "partition", "", "only what reaches into this `partition`")
	f.StringSliceVar(&states, "state", nil, "only these `states`: pending, active, revoking, revoked, failed")
	_ = cmd.RegisterFlagCompletionFunc("holder", a.completeVM)
	_ = cmd.RegisterFlagCompletionFunc("vm", a.completeVM)
	_ = cmd.RegisterFlagCompletionFunc("resource", a.completeCapability)
	_ = cmd.RegisterFlagCompletionFunc("partition", a.completePartition)
	_ = cmd.RegisterFlagCompletionFunc("state", cobra.FixedCompletions([]string{"pending", "active", "revoking", "revoked", "failed"}, cobra.ShellCompDirectiveNoFileComp))
	return cmd
}

func (a *app) grantTable(w io.Writer, grants []api.Grant, tree bool) {
	t := table{head: []string{"GRANT", "HOLDER", "CAPABILITY", "LABEL", "STATE", "ENDS"}, paint: a.stateColumn(4)}
	counted := slices.ContainsFunc(grants, func(g api.Grant) bool { return g.MaxUses != nil })
	if counted {
		t.head = append(t.head, "USES")
	}
	short := a.short(grantIDs(grants))
	add := func(prefix string, g api.Grant) {
		state := string(g.State)
		if g.Degraded != "" {
			state += ", degraded"
		}
		if g.Trouble != nil {
			state += a.troubleNote(*g.Trouble)
		}
		ends := "-"
		if g.State == api.GrantActive || g.State == api.GrantPending {
			ends = a.ends(g)
		}
		cells := []string{prefix + short(g.ID), orElse(g.HolderName, g.Holder.String()), orElse(g.Spoken, g.Spelling), g.Label, state, ends}
		if counted {
			cells = append(cells, usesText(g))
		}
		t.add(cells...)
	}
	if !tree {
		for _, g := range grants {
			add("", g)
		}
	} else {
		eachInTree(grants, add)
	}
	t.write(w)
}

// eachInTree visits grants from the roots down, each with the branches that
// lead to it. One whose parent is not among them is a root.
func eachInTree(grants []api.Grant, visit func(prefix string, g api.Grant)) {
	known := map[uuid.UUID]bool{}
	for _, g := range grants {
		known[g.ID] = true
	}
	children := map[uuid.UUID][]api.Grant{}
	for _, g := range grants {
		parent := uuid.Nil
		if g.Parent != nil && known[*g.Parent] && *g.Parent != g.ID {
			parent = *g.Parent
		}
		children[parent] = append(children[parent], g)
	}
	var walk func(parent uuid.UUID, indent string)
	walk = func(parent uuid.UUID, indent string) {
		below := children[parent]
		for i, g := range below {
			branch, rest := "├─ ", "│  "
			if i == len(below)-1 {
				branch, rest = "└─ ", "   "
			}
			if parent == uuid.Nil {
				branch, rest = "", ""
			}
			visit(indent+branch, g)
			walk(g.ID, indent+rest)
		}
	}
	walk(uuid.Nil, "")
}

func (a *app) showCommand() *cobra.Command {
	var why bool
	cmd := &cobra.Command{
		Use:   "show GRANT",
		Short: "Show one grant, and why it was decided as it was",
		Example: `  spectrum-cap show 5f3a9c01
  spectrum-cap show 5f3a9c01 --why
  spectrum-cap show 5f3a9c01 -o json`,
		Args:              args(1, 1, "a grant"),
		ValidArgsFunction: a.completeGrant,
		RunE: func(cmd *cobra.Command, got []string) error {
			if why {
				return a.printWhy(cmd.Context(), got[0])
			}
			g, err := a.broker().ShowGrant(cmd.Context(), got[0])
			if err != nil {
				return err
			}
			return a.print(g, func(w io.Writer) { a.grantFacts(g, true).write(w) })
		},
	}
	cmd.Flags().BoolVar(&why, "why", false, "show the chain from it to what it derives from, and the decision that allowed each step")
	return cmd
}

func (a *app) explainCommand() *cobra.Command {
	var (
		what requestFlags
		fail bool
	)
	cmd := &cobra.Command{
		Use:   "explain VM CAPABILITY",
		Short: "Tell what would become of a grant, without making it",
		Long: `Tell what would become of a grant, without making it: what each policy says and
by which rule, what would be granted, and what the broker would do.`,
		Example: `  spectrum-cap explain work/mail fs:ro:work:/invoices --ttl 1h
  spectrum-cap explain work/mail fs:rw:work:/invoices --exit-code && echo allowed`,
		Args:              args(2, 2, "a VM and a capability"),
		ValidArgsFunction: a.completeRequest,
		RunE: func(cmd *cobra.Command, got []string) error {
			req, err := what.request(got[0], got[1])
			if err != nil {
				return err
			}
			x, err := a.broker().Explain(cmd.Context(), req)
			if err != nil {
				return err
			}
			if err := a.print(x, func(w io.Writer) { writeExplanation(w, x) }); err != nil {
				return err
			}
			if fail && x.Verdict.Outcome != api.OutcomeAllow {
				return &codedError{exitDenied, "it would be denied"}
			}
			return nil
		},
	}
	what.register(cmd, a)
	cmd.Flags().BoolVar(&fail, "exit-code", false, "exit with code 3 if it would be denied")
	return cmd
}

func writeExplanation(w io.Writer, x api.Explanation) {
	put := func(format string, args ...any) { _, _ = fmt.Fprintln(w, plain(fmt.Sprintf(format, args...))) }
	word := "denied"
	if x.Verdict.Outcome == api.OutcomeAllow {
		word = "allowed"
	}
	put("It would be %s.", word)
	if x.Verdict.Summary != "" {
		put("%s", x.Verdict.Summary)
	}
	for _, line := range verdictLines(x.Verdict) {
		put("%s", line)
	}
	if x.Effective != nil {
		put("It would be %s", orElse(x.Spelling, x.Effective.Kind))
		if l := limitsText(x.Verdict.Limits); l != "" {
			put("  limits: %s", l)
		}
	}
	if len(x.Actions) > 0 {
		put("The broker would:")
		for i, action := range x.Actions {
			put("  %d. %s", i+1, strings.TrimSpace(action))
		}
	}
}

func sortedKeys(m map[string]string) []string { return slices.Sorted(maps.Keys(m)) }
