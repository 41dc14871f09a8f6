package cli

import (
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/google/uuid"
	"github.com/spf13/cobra"

	"spectrum-os.org/broker/broker/api"
)

func (a *app) planCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "plan [VM]",
		Short: "Tell what the broker would do now, and why",
		Long: `Tell what the broker would do now, and why, in one VM or in all of them: what is
to be made and to be taken away, what waits for something else, and what did not
work and is tried again, with when and why. Asking changes nothing.

All is well when there is nothing to do: what VMs have is what grants say. The
exit code is 0 either way; a script looks at steps and blind in the JSON.`,
		Example: `  spectrum-cap plan
  spectrum-cap plan work/mail
  spectrum-cap plan -o json | jq -e '[.vms[] | .steps + (.blind // [])] | flatten == []'`,
		Args:              args(0, 1, ""),
		ValidArgsFunction: a.completeVM,
		RunE: func(cmd *cobra.Command, got []string) error {
			vm := ""
			if len(got) > 0 {
				if vm = got[0]; vm == "" {
					return usage("%s needs the name of a VM, or none", cmd.CommandPath())
				}
			}
			p, err := a.broker().Plan(cmd.Context(), vm)
			if err != nil {
				return err
			}
			return a.print(p, func(w io.Writer) { a.writePlan(w, p) })
		},
	}
}

func (a *app) writePlan(w io.Writer, p api.Plan) {
	t := table{head: []string{"VM", "STEP", "GRANT", "CAPABILITY", "WHY"}}
	var ids []uuid.UUID
	for _, v := range p.VMs {
		for _, s := range append(v.Steps, v.Waits...) {
			ids = append(ids, s.Grants...)
		}
	}
	short := a.short(ids)
	something := false
	for _, v := range p.VMs {
		something = something || len(v.Steps)+len(v.Blind) > 0
		for _, why := range v.Blind {
			t.add(v.Name, "look", "", "", why)
		}
		for _, s := range append(v.Steps, v.Waits...) {
			verb, why := s.Verb, s.Why
			if s.UnderWay {
				verb += ", under way"
			}
			if s.Trouble != nil {
				why += "; " + troubleText(*s.Trouble, p.At)
			}
			var grants []string
			for _, g := range s.Grants {
				grants = append(grants, short(g))
			}
			t.add(v.Name, verb, strings.Join(grants, ", "), orElse(s.Spoken, s.Object), why)
		}
	}
	if !something {
		_, _ = fmt.Fprintln(w, "nothing to do")
	}
	if len(t.rows) > 0 {
		t.write(w)
	}
}

// attempt names what a verb tries to do, as people say it.
func attempt(verb string) string {
	switch verb {
	case "apply":
		return "attach"
	case "withdraw", "release":
		return "detach"
	}
	return verb
}

// troubleText says what does not work, and what becomes of it.
func troubleText(t api.Trouble, now time.Time) string {
	tries := "1 try"
	if t.Attempts > 1 {
		tries = fmt.Sprintf("%d tries", t.Attempts)
	}
	next := "trying again"
	if t.Next != nil {
		next = "next try now"
		if left := t.Next.Sub(now); left > 0 {
			next = "next try in " + shortDuration(max(left, time.Second).Round(time.Second))
		}
	}
	return fmt.Sprintf("cannot %s, %s since %s, %s: %s", attempt(t.Verb), tries, stamp(t.Since), next, t.Error)
}

// troubleNote is the same in few words, for a table.
func (a *app) troubleNote(t api.Trouble) string {
	next := "trying again"
	if t.Next != nil {
		next = "next try " + a.until(*t.Next)
		if !t.Next.After(a.now()) {
			next = "next try now"
		}
	}
	return fmt.Sprintf(" (cannot %s, %s)", attempt(t.Verb), next)
}
