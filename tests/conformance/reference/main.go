// SPDX-License-Identifier: Apache-2.0

// Command reference serves one of containerd's own snapshotters over the
// proxy-plugin protocol. It exists to show that the conformance harness is
// sound: whatever fails here is the harness's fault, not a snapshotter's.
//
//	reference SOCKET STATE_DIR [overlay|native]
package main

import (
	"fmt"
	"net"
	"os"
	"os/signal"
	"syscall"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/contrib/snapshotservice"
	"github.com/containerd/containerd/snapshots"
	"github.com/containerd/containerd/snapshots/native"
	"github.com/containerd/containerd/snapshots/overlay"
	"google.golang.org/grpc"
)

func serve(args []string) error {
	if len(args) < 2 || len(args) > 3 {
		return fmt.Errorf("usage: reference SOCKET STATE_DIR [overlay|native]")
	}
	kind := "overlay"
	if len(args) == 3 {
		kind = args[2]
	}
	var (
		sn  snapshots.Snapshotter
		err error
	)
	switch kind {
	case "overlay":
		sn, err = overlay.NewSnapshotter(args[1])
	case "native":
		sn, err = native.NewSnapshotter(args[1])
	default:
		err = fmt.Errorf("no such snapshotter: %s", kind)
	}
	if err != nil {
		return err
	}
	defer sn.Close()

	if err := os.Remove(args[0]); err != nil && !os.IsNotExist(err) {
		return err
	}
	listener, err := net.Listen("unix", args[0])
	if err != nil {
		return err
	}
	server := grpc.NewServer()
	snapshotsapi.RegisterSnapshotsServer(server, snapshotservice.FromSnapshotter(sn))

	stop := make(chan os.Signal, 1)
	signal.Notify(stop, syscall.SIGINT, syscall.SIGTERM)
	go func() {
		<-stop
		server.Stop()
	}()
	return server.Serve(listener)
}

func main() {
	if err := serve(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "reference:", err)
		os.Exit(1)
	}
}
