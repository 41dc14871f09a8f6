package cli

import (
	"fmt"
	"io"
	"runtime"
	"runtime/debug"
	"strconv"

	"github.com/spf13/cobra"
)

// healthy is the status of a broker that lacks nothing.
const healthy = "ok"

func (a *app) healthCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "health",
		Aliases: []string{"status"},
		Short:   "Ask the broker how it is",
		Long:    `Ask the broker how it is. It fails unless the broker is ready and well.`,
		Example: `  spectrum-cap health
  until spectrum-cap health >/dev/null 2>&1; do sleep 1; done`,
		Args: args(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			h, err := a.broker().Health(cmd.Context())
			if err != nil {
				return err
			}
			err = a.print(h, func(w io.Writer) {
				var f facts
				f.add("Broker", h.Status)
				f.add("Ready", yesNo(h.Ready))
				f.add("Version", h.Version)
				f.add("Process", strconv.Itoa(h.PID))
				f.add("Started", stamp(h.StartedAt))
				f.add("Socket", a.socketPath())
				f.add("Epoch", strconv.FormatUint(h.Epoch, 10))
				for _, p := range h.Problems {
					f.add("Problem", p)
				}
				f.write(w)
			})
			switch {
			case err != nil:
				return err
			case !h.Ready:
				return &codedError{exitFailed, "the broker is not ready"}
			case h.Status != healthy:
				return &codedError{exitFailed, "the broker is " + h.Status}
			}
			return nil
		},
	}
}

// version is the answer of "version".
type version struct {
	Version  string `json:"version"`
	Revision string `json:"revision,omitempty"`
	Go       string `json:"go"`
	Platform string `json:"platform"`
}

func thisVersion() version {
	v := version{Version: "unknown", Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH}
	if info, ok := debug.ReadBuildInfo(); ok {
		v.Version = orElse(info.Main.Version, v.Version)
		for _, s := range info.Settings {
			if s.Key == "vcs.revision" {
				v.Revision = s.Value
			}
		}
	}
	return v
}

func (v version) String() string {
	return fmt.Sprintf("spectrum-cap %s (%s, %s)\n", v.Version, v.Go, v.Platform)
}

func (a *app) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version of this program",
		Long: `Print the version of this program, as "spectrum-cap --version" does; with
-o json or yaml also the revision that it was built from.`,
		Example: `  spectrum-cap version`,
		Args:    args(0, 0, ""),
		RunE: func(*cobra.Command, []string) error {
			v := thisVersion()
			return a.print(v, func(w io.Writer) { _, _ = io.WriteString(w, v.String()) })
		},
	}
}
