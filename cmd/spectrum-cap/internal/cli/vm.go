package cli

import (
	"fmt"
	"io"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"spectrum-os.org/broker/broker/api"
)

func (a *app) vmCommand() *cobra.Command {
	cmd := group(&cobra.Command{
		Use:   "vm",
		Short: "Start, stop and look at virtual machines",
		Example: `  spectrum-cap vm list
  spectrum-cap vm start work/mail`,
	})
	cmd.AddCommand(a.vmListCommand(), a.vmShowCommand(), a.vmStartCommand(), a.vmStopCommand(), a.vmConsoleCommand())
	return cmd
}

func (a *app) vmListCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "list",
		Aliases: []string{"ls"},
		Short:   "List every VM there is a definition of",
		Example: `  spectrum-cap vm list
  spectrum-cap vm list -o json`,
		Args: args(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			vms, err := a.broker().ListVMs(cmd.Context())
			if err != nil {
				return err
			}
			return a.print(api.VMList{VMs: vms}, func(w io.Writer) {
				t := table{head: []string{"VM", "UUID", "STATE", "ROLE", "AGENT", "GRANTS", "NOTE"}, paint: a.stateColumn(2)}
				short := a.short(vmIDs(vms))
				for _, v := range vms {
					t.add(v.Name, short(v.ID), string(v.State), v.Role, string(v.Agent.State), strconv.Itoa(v.Grants), vmNote(v))
				}
				t.write(w)
			})
		},
	}
}

func vmNote(v api.VM) string {
	var notes []string
	if v.Template {
		notes = append(notes, "template")
	}
	notes = append(notes, v.Degraded...)
	if v.Problem != "" {
		notes = append(notes, v.Problem)
	}
	return strings.Join(notes, "; ")
}

func (a *app) vmShowCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "show VM",
		Short: "Show one VM",
		Example: `  spectrum-cap vm show work/mail
  spectrum-cap vm show 1f0c2a9e -o yaml`,
		Args:              args(1, 1, "a VM"),
		ValidArgsFunction: a.completeVM,
		RunE: func(cmd *cobra.Command, got []string) error {
			v, err := a.broker().ShowVM(cmd.Context(), got[0])
			if err != nil {
				return err
			}
			return a.printVM(v)
		},
	}
}

func (a *app) printVM(v api.VM) error {
	return a.print(v, func(w io.Writer) {
		var f facts
		f.add("VM", v.Name)
		f.add("UUID", v.ID.String())
		if v.BuiltIn {
			f.add("Partition", "none, it is built in")
		} else if v.Partition != nil {
			f.add("Partition", words(v.PartitionName, v.Partition.String()))
		}
		f.add("State", string(v.State))
		f.add("Role", v.Role)
		if v.Template {
			f.add("Template", "yes")
		}
		for _, k := range sortedKeys(v.Labels) {
			f.add("Label", k+"="+v.Labels[k])
		}
		if v.PID > 0 {
			f.add("Processes", fmt.Sprintf("VMM %d, shim %d", v.PID, v.ShimPID))
		}
		if v.StartedAt != nil {
			f.add("Started", stamp(*v.StartedAt))
		}
		f.add("Agent", words(string(v.Agent.State), v.Agent.Version, v.Agent.Detail))
		f.add("Grants", strconv.Itoa(v.Grants))
		if v.PID > 0 {
			f.add("Free slots", strconv.Itoa(v.SlotsFree))
		}
		for _, d := range v.Degraded {
			f.add("Degraded", d)
		}
		f.add("Problem", v.Problem)
		f.write(w)
	})
}

func (a *app) vmStartCommand() *cobra.Command {
	var timeout string
	cmd := &cobra.Command{
		Use:   "start VM...",
		Short: "Start VMs, with the grants their definitions declare",
		Long: `Start VMs. Each VM's definition may declare grants: they are requested, and
decided by policy, at every start. One that is refused does not stop the VM.`,
		Example: `  spectrum-cap vm start work/mail
  spectrum-cap vm start work/mail private/web --timeout 1m`,
		Args:              args(1, -1, "a VM"),
		ValidArgsFunction: a.completeVMs,
		RunE: func(cmd *cobra.Command, got []string) error {
			return a.eachVM(cmd, got, timeout, "starting", func(c *api.Client, ref string) (api.VM, error) {
				ctx, cancel, err := withTimeout(cmd.Context(), timeout)
				if err != nil {
					return api.VM{}, err
				}
				defer cancel()
				return c.StartVM(ctx, ref)
			})
		},
	}
	cmd.Flags().StringVar(&timeout, "timeout", "", "give up waiting after this `duration`")
	return cmd
}

func (a *app) vmStopCommand() *cobra.Command {
	var timeout, grace string
	cmd := &cobra.Command{
		Use:   "stop VM...",
		Short: "Stop VMs and end their grants",
		Example: `  spectrum-cap vm stop work/mail
  spectrum-cap vm stop work/mail --grace 30s
  spectrum-cap vm stop work/mail --grace 0s   # at once`,
		Args:              args(1, -1, "a VM"),
		ValidArgsFunction: a.completeVMs,
		RunE: func(cmd *cobra.Command, got []string) error {
			var req api.StopRequest
			if grace != "" {
				d, err := parseDuration("--grace", grace)
				if err != nil {
					return err
				}
				s := d.Seconds()
				req.GraceSeconds = &s
			}
			return a.eachVM(cmd, got, timeout, "stopping", func(c *api.Client, ref string) (api.VM, error) {
				ctx, cancel, err := withTimeout(cmd.Context(), timeout)
				if err != nil {
					return api.VM{}, err
				}
				defer cancel()
				return c.StopVM(ctx, ref, req)
			})
		},
	}
	cmd.Flags().StringVar(&grace, "grace", "", "how long the guest may take before it is killed, a `duration` (default: the broker's)")
	cmd.Flags().StringVar(&timeout, "timeout", "", "give up waiting after this `duration`")
	return cmd
}

// eachVM does something to VMs one by one, goes on after a failure, and fails
// with the first.
func (a *app) eachVM(cmd *cobra.Command, refs []string, timeout, doing string, do func(*api.Client, string) (api.VM, error)) error {
	if timeout != "" {
		if _, err := parseDuration("--timeout", timeout); err != nil {
			return err
		}
	}
	var first error
	var done []api.VM
	for _, ref := range refs {
		end := a.progress("%s %s", doing, ref)
		v, err := do(a.broker(), ref)
		end()
		switch {
		case err == nil:
			done = append(done, v)
			continue
		case first == nil:
			first = err
		default:
			a.printError(cmd, err)
		}
		if cmd.Context().Err() != nil {
			break
		}
	}
	if len(done) == 0 {
		return first
	}
	err := a.print(api.VMList{VMs: done}, func(w io.Writer) {
		for _, v := range done {
			_, _ = fmt.Fprintf(w, "%s is %s\n", plain(v.Name), v.State)
			for _, d := range v.Degraded {
				_, _ = fmt.Fprintf(w, "  degraded: %s\n", plain(d))
			}
			if v.Problem != "" {
				_, _ = fmt.Fprintf(w, "  %s\n", plain(v.Problem))
			}
		}
	})
	if first == nil {
		first = err
	}
	return first
}
